"""Runs of our own made smaller: experts dropped, merged, thinned or narrowed, and the recipe says so."""

import pytest
import torch

from moestro.compress import PlanError, read_plan
from moestro.compress.feasible import Output
from moestro.compress.methods import Request
from moestro.compress.own import apply_to_run
from moestro.compress.running import applied_to, compressed, plan_for, require_possible
from moestro.compress.source import RunSource
from moestro.compress.widths import unit_norms, wide_enough
from moestro.recipe.build import run_training
from moestro.recipe.evaluation import evaluate_run, opened_run
from moestro.recipe.load import load_recipe
from tests.conftest import ROOT

TINY = ("model.d_model=32", "model.n_layers=2", "train.budget.steps=2", "train.batch_size=2", "data.seq_len=32")


def trained(folder, *more, recipe="hmoe"):
    (folder / "text.txt").write_text("Experts of different widths share a layer. " * 30)
    data = ("data.source={kind: text, paths: " + str(folder / "text.txt") + "}", "data.tokenizer={kind: bytes}")
    loaded = load_recipe(
        ROOT / "recipes" / f"{recipe}.yaml",
        [
            *TINY,
            *data,
            "data.val_source={kind: text, paths: " + str(folder / "text.txt") + "}",
            "train.eval_tokens=64",
            *more,
        ],
    )
    run_training(loaded, folder / "run", show_preparation=False)
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("run"))


def request(source, method, ratio, **more):
    return Request(source, method, ratio, tokens=512, seq_len=32, **more)


@pytest.mark.parametrize("method", ["frequency", "recon"])
def test_a_run_loses_experts_and_stays_a_run(tmp_path, run, method):
    compressed(request(run, method, 0.25), tmp_path / "dst")
    plan = read_plan(tmp_path / "dst" / "compression_plan.json")
    small, old = opened_run(tmp_path / "dst").model, opened_run(run).model
    for layer in plan.layers:
        bank, whole = small.blocks[layer.layer].ffn.bank, old.blocks[layer.layer].ffn.bank
        assert len(layer.keep) == 6 and bank.widths == tuple(whole.widths[e] for e in layer.keep)
        for new, e in enumerate(layer.keep):
            assert torch.equal(bank.w_in.matrices()[new], whole.w_in.matrices()[e])
    assert evaluate_run(opened_run(tmp_path / "dst"))["loss"] > 0
    assert compressed(request(run, method, 0.25), tmp_path / "dst") == tmp_path / "dst"


@pytest.mark.parametrize("per_layer", [False, True])
def test_a_run_s_experts_become_narrower_by_the_units_that_weigh_least(tmp_path, run, per_layer):
    compressed(request(run, "width", 0.5, per_layer=per_layer), tmp_path / "dst")
    plan = read_plan(tmp_path / "dst" / "compression_plan.json")
    recipe = load_recipe(tmp_path / "dst" / "recipe.yaml")
    small, old = opened_run(tmp_path / "dst").model, opened_run(run).model
    for layer in plan.layers:
        widths = [len(units) for units in layer.units]
        assert small.blocks[layer.layer].ffn.bank.widths == tuple(widths)
        assert recipe.resolved["model"]["layers"][layer.layer]["branches"][0]["widths"] == widths
        bank = old.blocks[layer.layer].ffn.bank
        assert sum(widths) == pytest.approx(sum(bank.widths) / 2, abs=8)
        inside, out = bank.w_in.matrices()[3].detach(), bank.w_out.matrices()[3].detach()
        sizes = unit_norms(RunSource(run), layer.layer, 3)
        gate, up = inside.double().chunk(2)
        want = [float(gate[u].norm() * up[u].norm() * out[:, u].double().norm()) for u in range(len(gate))]
        assert sizes.tolist() == pytest.approx(want)
        kept = sizes[list(layer.units[3])].min()
        assert all(sizes[u] <= kept for u in range(len(want)) if u not in layer.units[3])
    with torch.no_grad():
        for layer in plan.layers:
            bank = old.blocks[layer.layer].ffn.bank
            for e, units in enumerate(layer.units):
                lost = [u for u in range(bank.widths[e]) if u not in units]
                bank.w_out.matrices()[e].T[lost] = 0
    tokens = torch.arange(40)[None] + 60
    torch.testing.assert_close(small(tokens).logits, old(tokens).logits, rtol=0, atol=1e-5)


def test_layers_that_a_plan_cannot_name_stay_as_they_are(tmp_path):
    layer = "model.layers.1={kind: moe, router: {kind: product_key, heads: 2, top_k: 2, d_key: 8}, "
    run = trained(tmp_path, layer + "branches: [{kind: singleton, n_experts: 64}]}", "objectives=[]")
    compressed(request(run, "width", 0.25), tmp_path / "dst")
    assert [layer.layer for layer in read_plan(tmp_path / "dst" / "compression_plan.json").layers] == [0]
    small, old = opened_run(tmp_path / "dst").model, opened_run(run).model
    for name, tensor in old.blocks[1].state_dict().items():
        assert torch.equal(small.blocks[1].state_dict()[name], tensor)
    assert sum(small.blocks[0].ffn.bank.widths) < sum(old.blocks[0].ffn.bank.widths)
    with pytest.raises(ValueError, match=r"every mixture. blocks.1.ffn: ProductKeyRouter has .*; or method width"):
        plan_for(request(run, "frequency", 0.25), tmp_path / "plan.json")


def test_a_run_of_product_keys_alone_has_nothing_to_name(tmp_path):
    layer = "model.ffn={kind: moe, router: {kind: product_key, heads: 2, top_k: 2, d_key: 8}, "
    run = trained(tmp_path, layer + "branches: [{kind: singleton, n_experts: 64}]}", "objectives=[]")
    with pytest.raises(PlanError, match="ProductKeyRouter has no rows of experts; allowed: scored, biased"):
        plan_for(request(run, "width", 0.25), tmp_path / "plan.json")


@pytest.mark.parametrize("recipe", ["hypermoe", "remoe"])
def test_what_lies_beside_the_experts_loses_them_too(tmp_path, recipe):
    run = trained(tmp_path, recipe=recipe)
    compressed(request(run, "frequency", 0.25), tmp_path / "dst")
    plan = read_plan(tmp_path / "dst" / "compression_plan.json")
    small, old = opened_run(tmp_path / "dst").model, opened_run(run).model
    for layer in plan.layers:
        new, whole = small.blocks[layer.layer].ffn, old.blocks[layer.layer].ffn
        assert len(layer.keep) == new.router.n_experts == new.bank.n_experts == 6
        for branch, before in zip(new.branches, whole.branches, strict=True):
            if branch is not new.bank:
                assert torch.equal(branch.experts, before.experts[list(layer.keep)])
    assert evaluate_run(opened_run(tmp_path / "dst"))["loss"] > 0


@pytest.mark.parametrize("method", ["frequency", "width"])
@pytest.mark.parametrize("recipe", ["mpoe", "mumoe", "moe_plus_plus", "multi_head"])
def test_experts_whose_widths_no_recipe_can_list_are_refused_before_anything_is_measured(tmp_path, recipe, method):
    run = trained(tmp_path, recipe=recipe)
    with pytest.raises(PlanError, match=r"only mixtures \{kind: moe\} of feed-forward experts \{kind: ffn\}"):
        require_possible(request(run, method, 0.25))


@pytest.mark.parametrize("method", ["merge", "hc-smoe"])
def test_experts_of_different_widths_are_not_merged(tmp_path, run, method):
    with pytest.raises(PlanError, match="block 0: experts of widths .*, allowed for merging: equal widths"):
        plan_for(request(run, method, 0.25, text="nowhere"), tmp_path / "plan.json")


def test_units_of_all_experts_together_leave_every_expert_one():
    sizes = [torch.tensor([5.0, 1, 4]), torch.tensor([0.1, 0.3]), torch.tensor([2.0, 3, 6, 7])]
    assert wide_enough(sizes, 0.3) == ((0, 2), (1,), (1, 2, 3))
    assert wide_enough(sizes, 0.5, together=True) == ((0,), (1,), (2, 3))
    assert wide_enough(sizes, 0.9, together=True) == ((0,), (1,), (3,))
    assert wide_enough(sizes, 0.0) == ((0, 1, 2), (0, 1), (0, 1, 2, 3))
    # units that are equally large, or all nothing, protect their expert once
    assert wide_enough([torch.zeros(4), sizes[2]], 0.5, together=True) == ((0,), (1, 2, 3))


def test_plans_that_a_run_cannot_say_are_refused(tmp_path, run):
    for change, said in (
        ({"semantics": "zero"}, "own format and semantics 'slice'"),
        ({"output": Output("custom")}, "own format"),
        ({"ratio": 0.9, "method": "reap"}, "fewer than the 2 experts"),
    ):
        with pytest.raises(PlanError, match=said):
            plan_for(Request(**{**vars(request(run, "width", 0.25)), **change}), tmp_path / "plan.json")
    plan = plan_for(request(run, "width", 0.25), tmp_path / "plan.json")
    (tmp_path / "dst").mkdir()
    with pytest.raises(PlanError, match="exists and is no finished compression"):
        apply_to_run(RunSource(run), plan, tmp_path / "dst")
    with pytest.raises(PlanError, match="a run keeps its own format"):
        applied_to(run, plan, tmp_path / "other", Output("padded"))

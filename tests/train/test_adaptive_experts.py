"""The adaptive process of DynMoE (Guo 2024, arXiv:2405.14297); checks (a)-(g) are in tests/systems/test_dynmoe.py.

(h) who is removed, which slot is used again, with which row and threshold    test_decisions, test_an_update_*
(i) two processes with half of the batch each                                 test_ranks_*
(j) nothing from evaluation or recomputation                                  test_evaluation_and_recomputation_*
(k) killed in mid-window; which moments are forgotten                         test_an_interrupted_*, test_moments_*
(l) removing changes no loss                                                  test_removing_*
(m) a token along the sum of the unserved uses the new expert                 test_a_new_expert_serves_*
"""

import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from moestro import FFNBank, MoELayer, ScoredRouter
from moestro.model import Attention, Block, Transformer
from moestro.recipe.build import build_training
from moestro.recipe.load import load_recipe
from moestro.routers import CosineScore, TopAny
from moestro.train import AdaptiveExperts, OptimSettings, train
from moestro.train.adaptive_experts import decide
from moestro.train.checkpoint import read_state, read_tensors
from moestro.train.optim import build_optimizer
from tests.conftest import ROOT
from tests.reference import dynmoe
from tests.tolerances import FLOAT64
from tests.train.test_resume import Killed, require_equal_runs
from tests.train.tiny import VOCABULARY, WIDTH, Counting, tiny_model, tiny_settings

E = 5
POLICIES = ("keep", "copy", "mean", "fresh")


def layer(seed: int = 0, threshold: float = 0.25, first_available: int | None = 3) -> MoELayer:
    torch.manual_seed(seed)
    router = ScoredRouter(CosineScore(WIDTH, E, 1.0, orthogonal=True), TopAny(E), first_available)
    torch.nn.init.constant_(router.select.thresholds, threshold)
    return MoELayer(router, [FFNBank(WIDTH, [4] * E)])


def model(seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(VOCABULARY, WIDTH, [Block(WIDTH, Attention(WIDTH, 2), layer(seed + i)) for i in range(2)])


def started(of: torch.nn.Module, **options) -> AdaptiveExperts:
    rule = AdaptiveExperts(**{"every": 1, **options})
    rule.start(of, build_optimizer(of, OptimSettings()))
    return rule


def tokens(n: int = 30, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(seed))


def available(of: MoELayer) -> list[bool]:
    return of.router.available.tolist()


@pytest.mark.parametrize(
    ("mask", "used", "unserved", "want"),
    [
        ([1, 1, 1], [5, 0, 2], False, ([1, 0, 1], None)),
        ([1, 1, 1], [5, 0, 2], True, ([1, 1, 1], 1)),
        ([1, 1, 1], [5, 1, 2], True, ([1, 1, 1], None)),
        ([0, 1, 0], [0, 4, 0], True, ([1, 1, 0], 0)),
        ([1, 1, 0], [0, 4, 0], True, ([1, 1, 0], 0)),
        ([1, 1, 0], [0, 0, 0], True, ([1, 0, 0], 0)),
        ([1, 1, 0], [0, 0, 0], False, ([1, 1, 0], None)),
    ],
)
def test_decisions(mask, used, unserved, want):
    after, slot = decide(torch.tensor(mask).bool(), torch.tensor(used).double(), unserved)
    assert (after.long().tolist(), slot) == want


@pytest.mark.parametrize("threshold", [-1.01, 0.35, 0.6, 1.01])
def test_an_update_is_the_reference_s(threshold):
    """Mask, slot, router rows and thresholds, over two micro-batches."""
    moe = layer(threshold=threshold).double()
    rule, router = started(moe), moe.router
    W, G = router.score.weight.detach().clone(), router.select.thresholds.detach().clone()
    used, unserved, count = [0] * E, torch.zeros(WIDTH, dtype=torch.float64), 0
    for x in (tokens(7, 1).double(), tokens(5, 2).double()):
        rule.observe(moe(x)[1][0])
        chosen = [dynmoe.token_gates(x_t, W, G, available(moe), torch.tensor(1.0)) for x_t in x]
        more, direction, lost = dynmoe.record(x, chosen, E)
        used, unserved, count = [a + b for a, b in zip(used, more, strict=True)], unserved + direction, count + lost
    mask, slot, want_W, want_G = dynmoe.update(available(moe), used, unserved, count, W, G)
    rule.apply(1)
    assert available(moe) == mask and (count > 0) == (threshold > -1)
    torch.testing.assert_close(router.score.weight.detach(), want_W, **FLOAT64)
    torch.testing.assert_close(router.select.thresholds.detach(), want_G, **FLOAT64)
    if slot is not None:
        assert abs(float(router.score.weight[slot].detach().norm()) - 1) < 1e-12
    assert not any(record.any() for record in rule.records.values())


def test_only_steps_of_the_window_count():
    moe, x = layer(), tokens()
    rule = started(moe, every=10, window=3, first=5, until=20)
    counted = []
    for step in range(1, 31):
        rule.observe(moe(x)[1][0])
        counted += [step] if rule.seen else []
        rule.apply(step)
    assert counted == [3, 4, 5, 13, 14, 15]


def test_sums_that_cancel_add_no_expert():
    """Tokens without expert whose inputs sum to 0 have no direction."""
    moe = layer(threshold=1.01)
    rule, x = started(moe), tokens(1)
    rule.observe(moe(torch.cat([x, -x]))[1][0])
    before = available(moe)
    rule.apply(1)
    assert available(moe) == before


def test_removing_experts_that_nobody_used_changes_no_loss():
    moe, x = layer(first_available=None), tokens()
    with torch.no_grad():
        moe.router.select.thresholds.copy_(torch.tensor([0.2, 1.01, 0.0, -0.2, 1.01]))
    x = x[moe(x)[1][0].experts_per_token() > 0]
    y, (trace,) = moe(x)
    rule = started(moe)
    rule.observe(trace)
    rule.apply(1)
    assert available(moe) == [True, False, True, True, False]
    assert torch.equal(moe(x)[0], y)


def test_a_new_expert_serves_the_token_along_which_it_points():
    moe, x = layer(threshold=0.7), tokens()
    rule = started(moe)
    _, (trace,) = moe(x)
    unserved = x[trace.experts_per_token() == 0]
    assert len(unserved) > 3
    rule.observe(trace)
    rule.apply(1)
    slot = next(e for e in range(E) if trace.routing.load()[e] == 0)
    routing = moe.router(unserved.sum(0, keepdim=True) * 7)
    assert slot in routing.expert.tolist()
    served = moe(unserved)[1][0].experts_per_token() > 0
    assert int(served.sum()) > 0


@pytest.mark.parametrize("policy", POLICIES)
def test_moments_of_what_is_replaced_are_forgotten_and_no_others(policy):
    moe = layer(threshold=0.5)
    optimizer = build_optimizer(moe, OptimSettings())
    rule = AdaptiveExperts(every=1, new_experts=policy)
    rule.start(moe, optimizer)
    with torch.no_grad():
        moe.router.available[:] = True
    for seed in range(3):
        optimizer.zero_grad()
        moe(tokens(60, seed))[0].square().sum().backward()
        optimizer.step()
    with torch.no_grad():
        moe.router.available[[1, 4]] = False
    expected = {p: {k: v.clone() for k, v in entries.items()} for p, entries in optimizer.state.items()}
    weights = {p: p.detach().clone() for p in moe.parameters()}
    _, (trace,) = moe(tokens(40, 9))
    rule.observe(trace)
    rule.apply(1)
    assert available(moe) == [True] * 4 + [False]
    replaced = [(moe.router.score.weight, slice(1, 2)), (moe.router.select.thresholds, slice(1, 2))]
    if policy != "keep":
        replaced += moe.bank.weights_of(1)
    for parameter, rows in replaced:
        for name in ("exp_avg", "exp_avg_sq"):
            assert expected[parameter][name][rows].any()
            expected[parameter][name][rows] = 0
    for parameter, entries in expected.items():
        for name, value in entries.items():
            assert torch.equal(optimizer.state[parameter][name], value)
    load = trace.routing.load()
    for (parameter, rows), (_, most), parts in zip(
        moe.bank.weights_of(1),
        moe.bank.weights_of(int(load.argmax())),
        zip(*[moe.bank.weights_of(e) for e in (0, 2, 3)], strict=True),
        strict=True,
    ):
        old, new = weights[parameter], parameter.detach()
        want = {"keep": old[rows], "copy": old[most], "mean": torch.stack([old[r] for _, r in parts]).mean(0)}
        if policy == "fresh":
            assert not torch.equal(new[rows], old[rows]) and 0.2 < float(new[rows].std()) < 0.8
        else:
            torch.testing.assert_close(new[rows], want[policy], rtol=0, atol=0)
        others = torch.ones(len(old), dtype=torch.bool)
        others[rows] = False
        assert torch.equal(new[others], old[others])


def test_fresh_experts_differ_by_step_and_not_by_what_was_drawn_before():
    drawn = []
    for step, noise in ((1, 0), (1, 5), (2, 0)):
        moe = layer(threshold=1.01)
        rule = started(moe, new_experts="fresh")
        torch.randn(noise)
        state = torch.get_rng_state()
        rule.observe(moe(tokens())[1][0])
        rule.apply(step)
        assert torch.equal(torch.get_rng_state(), state)
        drawn.append(moe.bank.w_in.weight[:8].detach())
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_fresh_experts_differ_by_seed_step_and_layer_however_long_the_numbers_are():
    drawn = []
    for seed, step, n_layers in ((0, 10_000, 1), (7, 10_000, 1), (0, 1_000_000, 12), (0, 2_000_000, 12)):
        layers = torch.nn.ModuleList(layer(threshold=1.01) for _ in range(n_layers))
        rule = started(layers, new_experts="fresh", seed=seed)
        for each in layers:
            rule.observe(each(tokens())[1][0])
        rule.apply(step)
        drawn += [each.bank.w_in.weight[:8].detach() for each in layers]
    assert not any(torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


def states(of: Transformer, rule: AdaptiveExperts) -> list[torch.Tensor]:
    return [moe.router.available for moe in of.moe_layers().values()] + list(rule.records.values())


def test_evaluation_and_recomputation_record_nothing(tmp_path):
    ends = []
    for number, (recompute, every) in enumerate([(False, 0), (True, 0), (False, 1)]):
        trained, rule = model(), AdaptiveExperts(every=4, first=4, new_experts="mean")
        settings = tiny_settings(6, recompute=recompute, eval_every=every, accumulate=2)
        train(trained, Counting(), settings, [], [rule], tmp_path / str(number))
        ends.append(states(trained, rule))
    assert ends[0][2].any() and not torch.equal(ends[0][0], layer().router.available)
    for other in ends[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ends[0], other, strict=True))


@pytest.mark.parametrize("policy", ["copy", "fresh"])
def test_an_interrupted_run_ends_as_a_whole_one(tmp_path, policy):
    """Killed in step 7, in the second window; the checkpoint of step 5 was written in its middle."""

    class DiesAt(AdaptiveExperts):
        def apply(self, step: int) -> None:
            if step == 7:
                raise Killed
            super().apply(step)

    DiesAt.__name__ = "AdaptiveExperts"
    settings = tiny_settings(12, save_every=5)
    options = {"every": 3, "new_experts": policy}
    train(model(), Counting(), settings, [], [AdaptiveExperts(**options)], tmp_path / "whole")
    with pytest.raises(Killed):
        train(model(), Counting(), settings, [], [DiesAt(**options)], tmp_path / "half")
    saved = tmp_path / "half" / "checkpoints" / "step-00000005"
    masks = [mask for name, mask in read_tensors(saved, "model").items() if name.endswith("router.available")]
    assert len(masks) == 2 and any(mask.tolist() != [True] * 3 + [False] * 2 for mask in masks)
    assert all(record.any() for record in read_tensors(saved, "rules").values())
    torch.manual_seed(99)
    train(model(5), Counting(), settings, [], [AdaptiveExperts(**options)], tmp_path / "half")
    require_equal_runs(tmp_path / "half", tmp_path / "whole", 12)
    ends = [read_state(tmp_path / name / "checkpoints" / "step-00000012")["rules"] for name in ("half", "whole")]
    assert ends[0] == ends[1]


def two_updates(rank: int, ranks: int, output: Path) -> None:
    """What two updates make of a layer, where this process sees its share of the tokens."""
    moe = layer(threshold=0.5)
    rule = started(moe, new_experts="fresh")
    for step in (1, 2):
        # multiples of 1/8 sum without rounding, in any order
        x = (tokens(40, step) * 8).round() / 8
        rule.observe(moe(x.chunk(ranks)[rank])[1][0])
        rule.apply(step)
    save_file({name: value.clone() for name, value in moe.state_dict().items()}, output)


def one_rank(rank: int, meeting_point: Path, output: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=2)
    two_updates(rank, 2, output)
    dist.destroy_process_group()


def test_ranks_come_to_the_result_of_one_process(tmp_path):
    outputs = [tmp_path / f"{rank}.safetensors" for rank in (0, 1)]
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=one_rank, args=(r, tmp_path / "meeting", o)) for r, o in enumerate(outputs)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=60)
    assert [process.exitcode for process in ranks] == [0, 0]
    two_updates(0, 1, tmp_path / "alone")
    alone, first, second = (load_file(file) for file in (tmp_path / "alone", *outputs))
    assert alone["router.available"].tolist() != [True] * 3 + [False] * 2
    for name, value in alone.items():
        assert torch.equal(first[name], value) and torch.equal(second[name], value), name


def test_values_are_checked(tmp_path):
    for options, message in (
        ({"every": 3, "window": 4}, r"adaptive experts window=4 steps, allowed: 1 to every=3"),
        ({"every": 9, "window": 4, "first": 3}, r"adaptive experts first=3, allowed: at least window=4"),
        ({"every": 0}, "allowed: 1 to every=0"),
        ({"every": 1, "new_experts": "clone"}, "new_experts='clone', allowed: keep, copy, mean, fresh"),
    ):
        with pytest.raises(ValueError, match=message):
            AdaptiveExperts(**options)
    with pytest.raises(ValueError, match=r"found no router with thresholds; allowed: select: \{kind: top_any\}"):
        train(tiny_model(), Counting(), tiny_settings(2), [], [AdaptiveExperts(1)], tmp_path)
    unequal = MoELayer(layer().router, [FFNBank(WIDTH, [4, 4, 4, 4, 3])])
    with pytest.raises(ValueError, match="new_experts='mean' needs experts of one shape, FFNBank has others"):
        started(unequal, new_experts="mean")
    started(unequal, new_experts="fresh")


def test_recipes_know_router_and_rule():
    recipe = load_recipe(ROOT / "recipes" / "moe.yaml", ["rules=[{kind: adaptive_experts, every: 30, window: 10}]"])
    (rule,) = build_training(recipe)[2]
    assert isinstance(rule, AdaptiveExperts) and (rule.window, rule.first, rule.new_experts) == (10, 30, "keep")

"""Provable pruning against loops written from the paper: scores, order, both meanings, refusals, what is read."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from moestro.compress import PlanError
from moestro.compress.applying import apply_plan
from moestro.compress.feasible import Output
from moestro.compress.methods import Request, by_router_norms
from moestro.compress.router_norms import RoutersStillError, kept_by_change, norm_change, router_norm_changes
from moestro.formats import Checkpoint
from moestro.formats.shards import Shards
from tests.compress.folders import blocks, loaded, saved
from tests.formats.folders import mixtral_config, mixtral_tensors, write_folder
from tests.reference.router_norms import delta, kept, mixture

W0 = torch.tensor([[3.0, 4], [0, 1], [1, 0], [0, 2]])
W1 = torch.tensor([[6.0, 8], [0, 1], [0, -1], [0, 1]])


def rows(seed, n=8, d=6):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_the_hand_case():
    change = norm_change(W0, W1)
    assert change.tolist() == [5, 0, 0, -1] == delta(W0, W1)
    assert kept_by_change(change, 2) == (0, 2) and kept(change.tolist(), 2) == [0, 2]


def test_it_is_the_change_of_norms_not_the_norm_of_the_change():
    flipped = W1.clone()
    flipped[1] = torch.tensor([0.0, -1])
    assert norm_change(W0, flipped)[1] == 0 and (flipped - W0).norm(dim=1)[1] == 2


@pytest.mark.parametrize("n_kept", [1, 3, 7, 8])
def test_scores_and_order_are_the_reference_s(n_kept):
    before, after = rows(0), rows(1)
    change = norm_change(before, after)
    assert change.tolist() == pytest.approx(delta(before, after), abs=1e-14)
    assert list(kept_by_change(change, n_kept)) == kept(change.tolist(), n_kept)
    ties = torch.tensor([1.0, 0, 0, 1, 0, 0, 1, 1])
    assert list(kept_by_change(ties, n_kept)) == kept(ties.tolist(), n_kept)


def test_groups_lose_equally_many():
    change = torch.tensor([0.0, 1, 2, 3, 9, 8, 7, 6])
    assert kept_by_change(change, 4, groups=2) == (2, 3, 4, 5)
    assert kept_by_change(change, 4) == (4, 5, 6, 7)


def test_rotations_and_scales_do_not_matter_and_permutations_carry_over():
    before, after = rows(0), rows(1)
    rotation = torch.linalg.qr(rows(2, 6, 6))[0]
    change = norm_change(before, after)
    torch.testing.assert_close(norm_change(before @ rotation, after @ rotation), change, rtol=0, atol=1e-12)
    torch.testing.assert_close(norm_change(3 * before, 3 * after), 3 * change, rtol=0, atol=1e-12)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    assert torch.equal(norm_change(before[order], after[order]), change[order])


def test_a_common_shift_disappears_with_centring_and_gains_multiply_columns():
    before, after, shift = rows(0), rows(1), rows(2)[0]
    centred = norm_change(before, after, center=True)
    torch.testing.assert_close(norm_change(before, after + shift, center=True), centred, rtol=0, atol=1e-12)
    gains = rows(3)[0], rows(4)[0]
    want = delta(before * gains[0], after * gains[1])
    assert norm_change(before, after, gains=gains).tolist() == pytest.approx(want, abs=1e-13)


def tuned(tmp_path, change_of=1.0, **differences):
    """A folder and the one it was tuned from: routers differ, and the vocabulary."""
    before, after = mixtral_tensors(8), mixtral_tensors(8)
    draw = torch.Generator().manual_seed(5)
    for name in after:
        if name.endswith("gate.weight"):
            after[name] = after[name] + change_of * torch.randn(after[name].shape, generator=draw)
    after["model.embed_tokens.weight"] = torch.randn(20, 4)
    write_folder(tmp_path / "base", {**before, **differences}, mixtral_config(num_local_experts=8))
    write_folder(tmp_path / "tuned", after, mixtral_config(num_local_experts=8), n_shards=2)
    return Request(tmp_path / "tuned", "router-norm", 0.25, reference=tmp_path / "base"), before, after


def test_a_plan_keeps_what_grew_most(tmp_path):
    request, before, after = tuned(tmp_path)
    plan = by_router_norms(request)
    for layer in plan.layers:
        name = f"model.layers.{layer.layer}.block_sparse_moe.gate.weight"
        want = delta(before[name], after[name])
        assert layer.scores["router_norm_change"] == pytest.approx(want, abs=1e-6)
        assert list(layer.keep) == kept(want, 6)
    assert plan.reference.routers != plan.source.routers and by_router_norms(request) == plan


def test_routers_in_other_precisions_are_compared_in_float64(tmp_path):
    request, before, after = tuned(tmp_path)
    file = tmp_path / "base" / "model.safetensors"
    tensors = {name: tensor.bfloat16() if "gate.weight" in name else tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    name = "model.layers.0.block_sparse_moe.gate.weight"
    change = router_norm_changes(Checkpoint(tmp_path / "base"), Checkpoint(tmp_path / "tuned"))[0]
    assert change.tolist() == pytest.approx(delta(before[name].bfloat16().double(), after[name].double()), abs=1e-12)


def test_routers_that_did_not_move_are_refused(tmp_path):
    request, *_ = tuned(tmp_path, change_of=0.0)
    with pytest.raises(RoutersStillError, match=r"largest change .* is 0.0e\+00.*--reference, or --option force=true"):
        by_router_norms(request)
    forced = by_router_norms(Request(**{**vars(request), "options": {"force": True}}))
    assert all(layer.keep == (2, 3, 4, 5, 6, 7) for layer in forced.layers)
    assert by_router_norms(Request(**{**vars(request), "ratio": 0.0})).identical


def test_other_models_options_and_missing_references_are_refused(tmp_path):
    request, *_ = tuned(tmp_path)
    wider = {f"model.layers.{i}.block_sparse_moe.gate.weight": torch.zeros(8, 5) for i in range(2)}
    write_folder(tmp_path / "wide", {**mixtral_tensors(8), **wider}, mixtral_config(num_local_experts=8))
    write_folder(tmp_path / "few", mixtral_tensors(6), mixtral_config(num_local_experts=6))
    write_folder(tmp_path / "deep", mixtral_tensors(8, 3), mixtral_config(num_local_experts=8, num_hidden_layers=3))
    for change, said in (
        ({"reference": tmp_path / "wide"}, r"layer 0 is \(8, 5\) in .*wide, \(8, 4\)"),
        ({"reference": tmp_path / "few"}, r"layer 0 is \(6, 4\)"),
        ({"reference": tmp_path / "deep"}, r"experts in layers \(0, 1, 2\)"),
        ({"reference": None}, "--reference"),
        ({"options": {"centre": True}}, "no option 'centre', allowed: center, fold_norm, force"),
        ({"options": {"center": 1}}, "center=1, allowed: bool"),
        ({"options": {"fold_norm": True}}, "post_attention_layernorm.*which fold_norm needs"),
        ({"ratio": 1.0}, "ratio=1.0, allowed: 0 to below 1"),
    ):
        with pytest.raises(PlanError, match=said):
            by_router_norms(Request(**{**vars(request), **change}))


def test_only_router_tensors_are_read(tmp_path, monkeypatch):
    request, *_ = tuned(tmp_path)
    read = []
    real = Shards.read
    monkeypatch.setattr(Shards, "read", lambda self, name, *rows: (read.append(name), real(self, name, *rows))[1])
    by_router_norms(request)
    assert read and all(name.endswith("gate.weight") for name in read)


@pytest.mark.parametrize("semantics", ["slice", "zero"])
def test_both_meanings_of_pruned_are_the_reference_s(tmp_path, semantics):
    model = saved("mixtral", tmp_path / "src", num_hidden_layers=1)
    saved("mixtral", tmp_path / "base", num_hidden_layers=1, initializer_range=0.05)
    request = Request(
        tmp_path / "src",
        "router-norm",
        0.5,
        Output("custom"),
        semantics,
        reference=tmp_path / "base",
        options={"force": True},
    )
    plan = by_router_norms(request)
    apply_plan(tmp_path / "src", plan, tmp_path / "dst", Output("custom"))
    block = blocks(loaded(tmp_path / "dst", trust=True))[0]
    old = blocks(model)[0]
    experts = [
        lambda x, e=e: (
            old.experts.down_proj[e]
            @ (torch.nn.functional.silu(old.experts.gate_up_proj[e][:24] @ x) * (old.experts.gate_up_proj[e][24:] @ x))
        )
        for e in range(8)
    ]
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    pruned = [e for e in range(8) if e not in plan.layers[0].keep]
    with torch.no_grad():
        want = mixture(x, old.gate.weight, experts, 2, pruned, semantics)
        torch.testing.assert_close(block(x[None])[0], want, rtol=0, atol=1e-6)
    assert len(pruned) == 4

"""Plans applied in memory: what slicing, zeroing, merging, narrowing and low ranks do to a model."""

import pytest
import torch

from moestro.compress.applied import applied, layer_number
from moestro.compress.calibration import Ask, calibrate
from moestro.compress.feed_forward import FeedForward
from moestro.compress.masking import without
from moestro.compress.plan import Group, LayerPlan
from moestro.experts import StackedBank
from moestro.layers.editing import scaled_experts
from moestro.routers import RemappedRouter
from tests.compress.models import D, E, decoder, text
from tests.tolerances import FLOAT64

EVERYTHING = tuple(range(E))


def logits(model, batch):
    with torch.no_grad():
        return model(batch.tokens, documents=batch.documents).logits


@pytest.fixture
def model():
    return decoder("mdm")


@pytest.fixture
def batch():
    return text(1)[0]


def test_slicing_equals_masking(model, batch):
    plans = [LayerPlan(0, E, (0, 2, 3, 5)), LayerPlan(2, E, (1, 2, 4))]
    layers = list(model.moe_layers().values())
    with without(layers[0], [1, 4]), without(layers[1], [0, 3, 5]):
        masked = logits(model, batch)
    found = applied(model, plans)
    torch.testing.assert_close(logits(found, batch), masked, **FLOAT64)
    assert [layer.router.n_experts for layer in found.moe_layers().values()] == [4, 3]


def test_zeroing_leaves_the_other_gates_as_they_are(model, batch):
    layer = model.moe_layers()["blocks.0.ffn"]
    with scaled_experts(layer, {1: 0.0, 4: 0.0}):
        zeroed = logits(model, batch)
    found = applied(model, [LayerPlan(0, E, (0, 2, 3, 5))], "zero")
    torch.testing.assert_close(logits(found, batch), zeroed, **FLOAT64)
    assert not torch.allclose(logits(applied(model, [LayerPlan(0, E, (0, 2, 3, 5))]), batch), zeroed)


def test_nothing_removed_is_nothing_changed(model, batch):
    for semantics in ("slice", "zero"):
        found = applied(model, [LayerPlan(0, E, EVERYTHING)], semantics)
        assert torch.equal(logits(found, batch), logits(model, batch))


def copied(model):
    """Expert 4 of the first mixture is expert 1 once more, with a router row of its own."""
    bank = model.moe_layers()["blocks.0.ffn"].bank
    with torch.no_grad():
        for linear in (bank.w_in, bank.w_out):
            linear.weight[linear.rows_of(4)] = linear.weight[linear.rows_of(1)]


def merge(weights=(0.5, 0.5), align=True):
    groups = (Group((0,), (1.0,)), Group((1, 4), weights, align), *(Group((e,), (1.0,)) for e in (2, 3, 5)))
    return LayerPlan(0, E, (0, 1, 2, 3, 5), groups=groups)


def test_identical_experts_merge_without_loss_under_remap_and_not_when_shrunk(model, batch):
    copied(model)
    before = logits(model, batch)
    torch.testing.assert_close(logits(applied(model, [merge()], "remap"), batch), before, **FLOAT64)
    for rows in ("kept", "mean"):
        shrunk = logits(applied(model, [merge()], "slice", rows), batch)
        assert float((shrunk - before).abs().max()) > 1e-3


def test_merged_rows_are_means_of_the_group_s(model):
    plan = merge((0.25, 0.75))
    before = model.moe_layers()["blocks.0.ffn"].router.score.weight
    after = applied(model, [plan], "slice", "mean").moe_layers()["blocks.0.ffn"].router.score.weight
    torch.testing.assert_close(after[1], 0.25 * before[1] + 0.75 * before[4], rtol=1e-6, atol=1e-7)
    assert torch.equal(after[[0, 2, 3, 4]], before[[0, 2, 3, 5]])
    kept = applied(model, [plan], "slice", "kept").moe_layers()["blocks.0.ffn"].router.score.weight
    assert torch.equal(kept, before[[0, 1, 2, 3, 5]])


def test_remap_keeps_the_sum_of_every_token_s_gates(model, batch):
    layer = applied(model, [merge()], "remap").moe_layers()["blocks.0.ffn"]
    x = torch.randn(300, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before, after = layer.router.router(x).dense(), layer.router(x).dense()
    torch.testing.assert_close(after.sum(1), before.sum(1), **FLOAT64)
    torch.testing.assert_close(after[:, 1], before[:, 1] + before[:, 4], **FLOAT64)
    routing = layer.router(x)
    pairs = list(zip(routing.token.tolist(), routing.expert.tolist(), strict=True))
    assert len(pairs) == len(set(pairs)) < 600


def test_units_that_go_are_gone(model, batch):
    units = (None, (0, 3), *(None,) * 4)
    found = applied(model, [LayerPlan(0, E, EVERYTHING, units=units)])
    bank = found.moe_layers()["blocks.0.ffn"].bank
    assert bank.widths == (5, 2, 5, 5, 5, 5)
    with torch.no_grad():
        zeroed = model.moe_layers()["blocks.0.ffn"].bank.w_out
        zeroed.weight[zeroed.rows_of(1)] *= torch.tensor([1.0, 0, 0, 1, 0], dtype=torch.float64)[:, None]
    torch.testing.assert_close(logits(found, batch), logits(model, batch), **FLOAT64)


def test_low_ranks_are_products_and_full_rank_is_the_expert(model, batch):
    whole = applied(model, [LayerPlan(0, E, EVERYTHING, ranks=(5,) * E)])
    torch.testing.assert_close(logits(whole, batch), logits(model, batch), **FLOAT64)
    thin = applied(model, [LayerPlan(0, E, EVERYTHING, ranks=(2, None, 2, 2, 2, 2))]).moe_layers()["blocks.0.ffn"]
    assert [int(torch.linalg.matrix_rank(m)) for m in thin.bank.w_out.matrices()] == [2, 5, 2, 2, 2, 2]
    assert torch.equal(*(FeedForward.of(layer).units(1) for layer in (thin, model.moe_layers()["blocks.0.ffn"])))


def test_moments_make_low_ranks_err_less_on_the_text(model):
    batches = text(8)
    seen = calibrate(model, batches, Ask(moments=True)).layers
    plans = [LayerPlan(number, E, EVERYTHING, ranks=(3,) * E) for number in (0, 2)]
    error = {}
    for whitened in (False, True):
        found = applied(model, plans, moments=seen if whitened else None)
        error[whitened] = sum(float((logits(found, b) - logits(model, b)).square().sum()) for b in batches)
    assert error[True] < error[False]


def test_skipping_drops_second_experts_of_small_gates(model):
    layer = applied(model, [LayerPlan(0, E, EVERYTHING, skip_below=0.5)]).moe_layers()["blocks.0.ffn"]
    x = torch.randn(30, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gates, before = layer.router(x).dense(), model.moe_layers()["blocks.0.ffn"].router(x).dense()
    first, second = before.topk(2).values.unbind(1)
    assert torch.equal((gates > 0).sum(1), 1 + (second >= 0.5 * first).long())
    torch.testing.assert_close(gates.sum(1), torch.ones(30, dtype=gates.dtype), rtol=1e-6, atol=0)


def test_plans_of_other_layers_are_refused(model):
    with pytest.raises(ValueError, match="layer 1 has no experts"):
        applied(model, [LayerPlan(1, E, EVERYTHING)])
    with pytest.raises(ValueError, match="the plan is of 7"):
        applied(model, [LayerPlan(0, 7, (0, 1))])
    twice = applied(model, [merge()], "remap")
    assert isinstance(twice.moe_layers()["blocks.0.ffn"].router, RemappedRouter)
    with pytest.raises(ValueError, match="for top-k routers"):
        applied(twice, [LayerPlan(0, 5, (0, 1, 2, 3, 4), skip_below=0.5)])
    assert layer_number("model.layers.12.mlp") == 12
    with pytest.raises(ValueError, match="no number"):
        layer_number("ffn")


def test_experts_in_stacked_tensors_are_edited_alike(model, batch):
    """As transformers keeps them: the same units, the same model after merging, low ranks and slicing."""
    stacked = decoder("mdm")
    for layer in stacked.moe_layers().values():
        old, bank = FeedForward.of(layer), StackedBank(D, E, 5).double()
        with torch.no_grad():
            for expert in range(E):
                inside, out = old.matrices(expert)
                bank.gate_up[expert].copy_(inside)
                bank.down[expert].copy_(out)
                assert torch.equal(FeedForward(bank).units(expert), old.units(expert))
        layer.branches[0] = bank
    thin = LayerPlan(2, E, (0, 2, 3), ranks=(3, 4, None))
    for plans in ([merge(align=True), thin], [LayerPlan(0, E, (1, 4))]):
        torch.testing.assert_close(logits(applied(stacked, plans), batch), logits(applied(model, plans), batch))

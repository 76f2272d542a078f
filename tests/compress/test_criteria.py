"""Statistics of experts on text, scores, masks and the damage of removing experts, against the equations."""

import math

import pytest
import torch

from moestro.compress.criteria import CRITERIA, highest, random_scores, removed, skip_threshold
from moestro.compress.damage import Damage
from moestro.compress.masking import without
from moestro.compress.observed import Observed, expert_output, gates_of
from moestro.experts import FFNBank
from moestro.layers import MoELayer
from moestro.routers import BiasedRouter, GroupLimit, LinearScore, ScoredRouter, SlotRouter, TopK
from moestro.routing import SparseRouting
from tests.compress.layers import matrices, small_layer, tokens
from tests.reference import expert_removal as reference
from tests.tolerances import FLOAT64


def observed(layer, x, everywhere=False, pieces=3):
    seen = Observed(layer.router.n_experts)
    for part in x.chunk(pieces):
        seen.observe(layer, part, layer.router(part), everywhere)
    return seen


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("renormalize", [True, False])
def test_statistics_are_those_of_the_equations(renormalize, everywhere):
    layer, x = small_layer(renormalize=renormalize), tokens()
    expected = reference.statistics(layer.router.score.weight.detach(), matrices(layer), x, 2, renormalize)
    seen = observed(layer, x, everywhere)
    assert seen.tokens == 40 and seen.rows.tolist() == expected["rows"]
    assert seen.together.tolist() == expected["together"]
    for name, values in {"gates": seen.gates, "man": CRITERIA["man"](seen), "reap": CRITERIA["reap"](seen)}.items():
        # the router computes in float32 whatever the model's dtype
        torch.testing.assert_close(values.tolist(), expected[name], rtol=1e-5, atol=1e-6)
    assert CRITERIA["frequency"](seen).tolist() == pytest.approx([n / 80 for n in expected["rows"]])
    assert CRITERIA["gate-sum"](seen).tolist() == pytest.approx([g / 40 for g in expected["gates"]], rel=1e-5)
    if everywhere:
        means = torch.stack([expert_output(layer, e, x).sum(0) for e in range(6)])
        torch.testing.assert_close(seen.outputs, means.detach(), **FLOAT64)


def test_an_expert_that_no_token_meets_has_scores_and_is_named():
    layer = small_layer()
    with torch.no_grad():
        layer.router.score.weight[3] = 0
    x = tokens().abs() * layer.router.score.weight[0].sign()
    with without(layer, [3]):
        seen = observed(layer, x)
    assert 3 in seen.unseen() and set(seen.unseen()) <= set(seen.unseen(5))
    assert all(bool(criterion(seen).isfinite().all()) for criterion in CRITERIA.values())
    with pytest.raises(AttributeError, match="'outputs' was not collected"):
        _ = seen.outputs


def test_an_expert_whose_gate_is_zero_was_computed():
    """It has rows, and the norm of what it answered; its share is 0."""
    routing = SparseRouting(torch.tensor([0, 0, 1]), torch.tensor([1, 2, 2]), torch.tensor([1.0, 0.0, 1.0]), 2, 3)
    gates, met = gates_of(routing)
    assert gates.tolist() == [[0, 1, 0], [0, 0, 1]] and met.tolist() == [[False, True, True], [False, False, True]]


def test_entropy_is_that_of_the_router_s_probabilities():
    layer, x = small_layer(), tokens()
    p = (x.float() @ layer.router.score.weight.float().T).double().softmax(-1)
    torch.testing.assert_close(observed(layer, x).entropy, -(p * p.log()).sum().detach(), rtol=1e-6, atol=0)
    with without(layer, [0, 1]):
        assert math.isfinite(float(observed(layer, x).entropy))


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("experts", [(), (2,), (0, 5), (1, 2, 3, 4)])
def test_damage_is_that_of_the_equations(experts, renormalize):
    layer, x = small_layer(renormalize=renormalize), tokens()
    expected = reference.damage(layer.router.score.weight.detach(), matrices(layer), x, 2, experts, renormalize)
    damage = Damage(layer, x, piece=7)
    assert damage(experts) == pytest.approx(expected, rel=1e-5, abs=0)
    whole = layer(x)[0].detach().norm()
    assert damage.relative(experts) == pytest.approx(expected / float(whole), rel=1e-5)
    if not experts:
        assert damage(()) == 0


def test_damage_of_each_expert_alone_and_of_too_many():
    damage = Damage(small_layer(), tokens())
    assert damage.of_each() == [damage((expert,)) for expert in range(6)]
    with pytest.raises(ValueError, match="top_k=2 > 1"):
        damage((0, 1, 2, 3, 4))


def test_a_dead_expert_that_rarely_wins_is_the_least_damage():
    layer, x = small_layer(), tokens()
    with torch.no_grad():
        layer.bank.w_out.weight[layer.bank.w_out.rows_of(4)] = 0
        layer.router.score.weight[4] *= 0.01
    each = Damage(layer, x).of_each()
    assert each.index(min(each)) == 4


@pytest.mark.parametrize("kind", ["scored", "biased"])
def test_leaving_experts_out_equals_slicing_router_and_bank(kind):
    layer, x, kept = small_layer(), tokens(), [0, 2, 3, 5]
    if kind == "biased":
        router = BiasedRouter(layer.router.score, 2, renormalize=True)
        router.bias.normal_()
        layer = MoELayer(router, [layer.bank]).double().eval()
    before = layer(x)[0]
    with without(layer, [1, 4]):
        masked = layer(x)[0]
    assert torch.equal(layer(x)[0], before)
    layer.reindex(torch.tensor(kept))
    torch.testing.assert_close(masked, layer(x)[0], **FLOAT64)
    assert not torch.allclose(masked, before)


def test_masks_are_refused_where_they_mean_nothing():
    layer = small_layer()
    with pytest.raises(ValueError, match="allowed: 0 to 5"), without(layer, [6]):
        pass
    biased = MoELayer(BiasedRouter(LinearScore(8, 6), 2), [FFNBank(8, [4] * 6)])
    grouped = MoELayer(BiasedRouter(LinearScore(8, 6), 2, limit=GroupLimit(2, 1)), [FFNBank(8, [4] * 6)])
    with pytest.raises(ValueError, match=r"top_k=2, but 1 groups of sizes \[1, 3\] may hold"), without(grouped, [0, 2]):
        pass
    with pytest.raises(ValueError, match="top_k=2 > 1"), without(biased, [0, 1, 2, 3, 4]):
        pass
    slots = MoELayer(SlotRouter(8, 6, 1), [FFNBank(8, [4] * 6)])
    with pytest.raises(ValueError, match="no scores of experts"), without(slots, [0]):
        pass
    with pytest.raises(ValueError, match="mixes tokens"):
        gates_of(slots.router(tokens().float()))


def test_the_highest_scores_stay_ties_to_the_lower_expert():
    scores = torch.tensor([1.0, 3, 3, 0, 2, 5])
    assert highest(scores, 3) == (1, 2, 5)
    assert highest(scores, 2) == (1, 5)
    assert highest(scores, 4, groups=2) == (1, 2, 4, 5)
    assert removed((1, 2, 5), 6) == (0, 3, 4)
    with pytest.raises(ValueError, match="as many of every group"):
        highest(scores, 3, groups=2)
    with pytest.raises(ValueError, match="finite"):
        highest(torch.tensor([1.0, math.nan]), 1)


def test_random_scores_depend_on_seed_and_layer_alone():
    assert torch.equal(random_scores(8, 0, 1), random_scores(8, 0, 1))
    draws = {tuple(random_scores(8, seed, layer).tolist()) for seed in range(3) for layer in range(3)}
    assert len(draws) == 9


def test_the_threshold_of_skipping_is_the_median_ratio():
    weights = torch.tensor([[0.5, 0.5], [0.2, 0.8], [0.9, 0.1]])
    assert skip_threshold(weights) == pytest.approx(0.25)
    router = ScoredRouter(LinearScore(8, 6), TopK(2))
    assert 0 < skip_threshold(router(tokens().float()).weight.view(-1, 2)) <= 1
    with pytest.raises(ValueError, match="at least 2"):
        skip_threshold(torch.ones(4, 1))

"""Experts that are not available: with every selection and every objective of the registry."""

import math

import pytest
import torch

from moestro.experts import FFNBank
from moestro.layers import MoELayer
from moestro.recipe.parts import PARTS
from moestro.routers import LinearScore, ScoredRouter, TopK, TopP
from moestro.routing import SparseRouting
from tests.properties.test_pairs import SELECTS, D, E, gradients, scored, tokens
from tests.tolerances import FLOAT64

OUT = torch.tensor([1, 4, 5, 8])
IN = torch.tensor([e for e in range(E) if e not in OUT.tolist()])
selects = pytest.mark.parametrize("select", SELECTS)


def layer(select: str) -> MoELayer:
    torch.manual_seed(7)
    return MoELayer(scored("linear", select), [FFNBank(D, [3, 5, 0, 8, 1, 2, 2, 7, 4])]).double()


def router(of: MoELayer) -> ScoredRouter:
    assert isinstance(of.router, ScoredRouter)
    return of.router


def without(of: MoELayer) -> MoELayer:
    available = torch.ones(E, dtype=torch.bool)
    available[OUT] = False
    router(of).set_available(available)
    return of


@selects
def test_they_are_never_chosen_and_get_no_weight(select):
    routing = without(layer(select)).router(tokens())
    assert not routing.dense()[:, OUT].any()
    assert (routing.logits[:, OUT] == -math.inf).all()
    assert torch.isfinite(routing.logits[:, IN]).all()
    if isinstance(routing, SparseRouting):
        assert not torch.isin(routing.expert, OUT).any()
        assert not routing.load()[OUT].any()


@selects
def test_the_layer_is_that_of_the_others_alone(select):
    """Outputs and gradients are those of a layer from which the experts were removed."""
    masked, removed, x = without(layer(select)), layer(select), tokens().requires_grad_()
    removed.reindex(IN)
    have, want = (moe(x)[0] for moe in (masked, removed))
    torch.testing.assert_close(have, want, **FLOAT64)
    mine, theirs = gradients(masked, x, have), gradients(removed, x, want)
    torch.testing.assert_close(mine["x"], theirs["x"], **FLOAT64)
    for name, gradient in theirs.items():
        if name.startswith("router."):
            torch.testing.assert_close(mine[name][IN], gradient, **FLOAT64)
            assert not mine[name][OUT].any()


@selects
@pytest.mark.parametrize("objective", PARTS["objectives"])
def test_objectives_stay_finite_and_teach_them_nothing(select, objective):
    moe, x = without(layer(select)), tokens().requires_grad_()
    try:
        value = PARTS["objectives"][objective]()(moe(x)[1][0])
    except ValueError as error:
        # it needs another selection or layer, and says which
        assert str(error).startswith(f"{objective} ")
        return
    names = dict(moe.router.named_parameters())
    found = torch.autograd.grad(value, [x, *names.values()], allow_unused=True)
    assert torch.isfinite(value)
    for name, gradient in zip(["x", *names], found, strict=True):
        if gradient is not None:
            assert torch.isfinite(gradient).all(), name
            assert name == "x" or gradient.ndim == 0 or not gradient[OUT].any(), name


def test_the_entropy_is_that_of_the_others() -> None:
    moe, removed = without(layer("top_k")), layer("top_k")
    removed.reindex(IN)
    entropy = PARTS["objectives"]["router_entropy"]()
    values = [entropy(of(tokens())[1][0]) for of in (moe, removed)]
    torch.testing.assert_close(*values, **FLOAT64)


@pytest.mark.parametrize(("select", "want"), [(TopK(2), {0, 2}), (TopP(1.0), {0, 2}), (TopP(0.0), {0})])
def test_probabilities_that_round_to_zero_do_not_let_them_in(select, want):
    """Expert 2 is available, though its probability is 0 as a float; expert 1, of a lower index, is not."""
    routing = select(torch.tensor([[0.0, -math.inf, -2000.0]]))
    assert set(routing.expert.tolist()) == want


def test_the_first_of_a_pool_can_be_available_at_the_start() -> None:
    pool = ScoredRouter(LinearScore(D, E), TopP(0.5), first_available=4)
    assert pool.available.tolist() == [True] * 4 + [False] * 5
    assert pool.rows_per_token() == 2
    assert pool(tokens().float()).load()[4:].sum() == 0
    assert "available" in pool.state_dict() and "available" not in dict(pool.named_parameters())


def test_experts_take_their_availability_with_them() -> None:
    pool = ScoredRouter(LinearScore(D, 4), TopK(1), first_available=2)
    pool.reindex(torch.tensor([3, -1, 0, 2, 1]))
    assert pool.available.tolist() == [False, True, True, False, True]


def test_values_are_checked() -> None:
    with pytest.raises(ValueError, match="first_available=0, allowed: 1 to 9, the number of experts"):
        ScoredRouter(LinearScore(D, E), TopP(0.5), first_available=0)
    with pytest.raises(ValueError, match="top_k=3 > 2 experts"):
        ScoredRouter(LinearScore(D, E), TopK(3), first_available=2)
    pool = ScoredRouter(LinearScore(D, 4), TopK(3))
    with pytest.raises(ValueError, match="top_k=3 > 2 experts"):
        pool.set_available(torch.tensor([True, False, True, False]))
    with pytest.raises(ValueError, match="allowed: at least one expert"):
        pool.set_available(torch.zeros(4, dtype=torch.bool))
    assert pool.available.all()
    pool.set_available(torch.tensor([True, False, True, True]))
    with pytest.raises(ValueError, match="top_k=3 > 2 experts"):
        pool.reindex(torch.tensor([1, 2, 3]))
    assert pool.n_experts == 4

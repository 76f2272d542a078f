"""Experts that are not available: with every selection and every objective of the registry."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from moestro.experts import FFNBank
from moestro.layers import AllRows, MoELayer
from moestro.recipe.parts import PARTS
from moestro.routers import Capacity, GroupLimit, LinearScore, ScoredRouter, TopK, TopP
from moestro.routing import SparseRouting, Trace
from tests.properties.test_pairs import SELECTS, D, E, gradients, scored, tokens
from tests.tolerances import FLOAT64

OUT = torch.tensor([1, 4, 5, 8])
IN = torch.tensor([e for e in range(E) if e not in OUT.tolist()])
# the selections of the objectives that are not for all
TAKEN = {
    "gate_l1": {"relu"},
    "gate_balance": {"top_any"},
    "gate_efficiency": {"top_any"},
    "retrieved_parameter_penalty": set(SELECTS) - {"soft"},
    "router_target": set(SELECTS) - {"soft"},
}
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


def watched(select: str) -> MoELayer:
    """A layer with whatever an objective may ask for: clusters, and the outputs of all experts."""
    plain = layer(select)
    return MoELayer(plain.router, list(plain.branches), record=AllRows(), clusters=3)


def trace_of(moe: MoELayer, x: torch.Tensor) -> Trace:
    """What the layer did, and what a teacher says."""
    (trace,) = moe(x)[1]
    return replace(trace, target=torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x))


def takes(objective: str, select: str) -> bool:
    """Whether the objective is for routers with this selection."""
    return select in TAKEN.get(objective, SELECTS)


@selects
@pytest.mark.parametrize("objective", PARTS["objectives"])
def test_objectives_stay_finite_and_teach_them_nothing(select, objective):
    moe, x = without(watched(select)), tokens().requires_grad_()
    loss, trace = PARTS["objectives"][objective](), trace_of(moe, x)
    if not takes(objective, select):
        with pytest.raises(ValueError, match=f"^{objective} "):
            loss(trace)
        return
    value, names = loss(trace), dict(moe.named_parameters())
    found = torch.autograd.grad(value, [x, *names.values()], allow_unused=True)
    assert torch.isfinite(value)
    for name, gradient in zip(["x", *names], found, strict=True):
        if gradient is not None:
            assert torch.isfinite(gradient).all(), name
            if name.startswith("router.") and gradient.ndim > 0:
                assert not gradient[OUT].any(), name
    gradients_of = dict(zip(names.values(), found[1:], strict=True))
    for expert in OUT.tolist():
        for parameter, rows in moe.bank.weights_of(expert):
            assert gradients_of[parameter] is None or not gradients_of[parameter][rows].any()


@pytest.mark.parametrize(
    ("name", "select"), [(name, select) for name in PARTS["objectives"] for select in SELECTS if takes(name, select)]
)
def test_objectives_are_those_of_the_others_alone(name, select):
    """Their values are those of a layer from which the experts were removed."""
    make = PARTS["objectives"][name]
    for objective in [make(), make(scale_by_n=True), make(literal=True)] if name == "router_entropy" else [make()]:
        masked, removed = without(watched(select)), watched(select)
        removed.reindex(IN)
        values = [objective(trace_of(moe, tokens())) for moe in (masked, removed)]
        torch.testing.assert_close(*values, **FLOAT64)


@pytest.mark.parametrize("best", [1, 2])
@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_groups_are_those_of_the_others_alone(best: int, gate: str) -> None:
    """A token looks in the groups that are its best without these experts."""
    whole, smaller = (GroupLimit(3, 2, best, sizes) for sizes in ((), (2, 1, 2)))
    masked = ScoredRouter(LinearScore(D, E, init_std=1.0), TopK(3, gate=gate, limit=whole)).double()
    removed = copy.deepcopy(masked)
    available = torch.ones(E, dtype=torch.bool)
    available[OUT] = False
    masked.set_available(available)
    removed.select = TopK(3, gate=gate, limit=smaller)
    removed.reindex(IN)
    torch.testing.assert_close(masked(tokens()).dense()[:, IN], removed(tokens()).dense(), **FLOAT64)


def test_groups_without_enough_available_experts_are_refused() -> None:
    pool = ScoredRouter(LinearScore(D, 8), TopK(2, limit=GroupLimit(2, 1)))
    with pytest.raises(ValueError, match=r"top_k=2, but 1 groups of sizes \[1, 3\] may hold fewer experts"):
        pool.set_available(torch.tensor([1, 0, 0, 0, 1, 1, 1, 0]).bool())
    with pytest.raises(ValueError, match=r"groups of sizes \[4, 1\]"):
        ScoredRouter(LinearScore(D, 8), TopK(2, limit=GroupLimit(2, 1)), first_available=5)
    limited = ScoredRouter(LinearScore(D, 8), Capacity(TopK(2, limit=GroupLimit(2, 1)), factor=1.0))
    with pytest.raises(ValueError, match=r"groups of sizes \[4, 1\]"):
        limited.set_available(torch.arange(8) < 5)
    pool.set_available(torch.arange(8) < 7)
    assert pool(tokens().float()).load()[7] == 0


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

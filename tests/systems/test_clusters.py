"""Clusters of experts on a layer and the variance inside them (checks a, b, d, e, f and h of MoEC's specification)."""

import pytest
import torch

from moestro.experts import CopyBank
from moestro.layers import MoELayer
from moestro.objectives import ClusterVariance
from moestro.routers import LinearScore, ScoredRouter, TopK
from moestro.routing import SparseRouting, Trace
from tests.reference import moec as reference
from tests.tolerances import FLOAT64

T = 20
UNEQUAL = [[0, 4], [1], [2, 3, 5, 6, 7]]
EQUAL = [[0, 1], [2, 3], [4, 5], [6, 7]]
KINDS = ["all", "within", "gap", "token_gap"]


def layer(clusters: list[list[int]]) -> MoELayer:
    of = [next(m for m, members in enumerate(clusters) if e in members) for e in range(sum(map(len, clusters)))]
    router = ScoredRouter(LinearScore(4, len(of)), TopK(1))
    return MoELayer(router, [CopyBank(len(of))], clusters=of)


def trace(logits: torch.Tensor, clusters: list[list[int]]) -> Trace:
    nothing = torch.zeros(0, dtype=torch.int64)
    routing = SparseRouting(nothing, nothing, logits.new_zeros(0), len(logits), logits.shape[1], logits)
    return Trace(layer(clusters), logits.new_zeros(len(logits), 4), routing)


def value(kind: str, logits: torch.Tensor, clusters: list[list[int]]) -> torch.Tensor:
    return ClusterVariance(kind)(trace(logits, clusters))  # type: ignore[arg-type]


def random(n: int = T, e: int = 8) -> torch.Tensor:
    return 2 * torch.randn(n, e, dtype=torch.float64, generator=torch.Generator().manual_seed(n))


def by_reference(kind: str, logits: torch.Tensor, clusters: list[list[int]]) -> torch.Tensor:
    p = reference.shares(logits, 1.0)
    if kind == "token_gap":
        return reference.token_gap(logits, 1.0, clusters)
    if kind == "gap":
        return reference.gap(p, clusters)
    return reference.within(p, [sum(clusters, [])] if kind == "all" else clusters)


@pytest.mark.parametrize("clusters", [EQUAL, UNEQUAL])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_equals_the_reference(kind: str, clusters: list[list[int]]) -> None:
    logits = random().requires_grad_()
    have, want = value(kind, logits, clusters), by_reference(kind, logits, clusters)
    torch.testing.assert_close(have, want, **FLOAT64)
    torch.testing.assert_close(*(torch.autograd.grad(v, logits)[0] for v in (have, want)), **FLOAT64)
    assert have > 0


@pytest.mark.parametrize("kind", ["within", "gap", "token_gap"])
def test_one_cluster_is_the_variance_over_all(kind: str) -> None:
    one = [list(range(8))]
    torch.testing.assert_close(value(kind, random(), one), value("all", random(), EQUAL), **FLOAT64)


@pytest.mark.parametrize("kind", ["within", "gap", "token_gap"])
def test_clusters_of_one_expert_cost_nothing(kind: str) -> None:
    logits = random().requires_grad_()
    found = value(kind, logits, [[e] for e in range(8)])
    assert found == 0 and not torch.autograd.grad(found, logits)[0].any()


def test_even_inside_costs_nothing_however_the_clusters_share() -> None:
    even = random(T, 4).repeat_interleave(2, dim=1)
    assert float(value("within", even, EQUAL)) < 1e-25 < 1e-3 < float(value("all", even, EQUAL))
    moved = even + torch.tensor([3.0, 3, 0, 0, -2, -2, 1, 1])
    assert float(value("within", moved, EQUAL)) < 1e-25
    uneven = even + torch.tensor([0.1, 0, 0, 0, 0, 0, 0, 0])
    assert float(value("within", uneven, EQUAL)) > 1e-6


def test_moving_mass_between_clusters_evenly_changes_nothing() -> None:
    p = random(1).softmax(-1)
    shifted = p + 0.01 * torch.tensor([1, 1, 0, 0, -1, -1, 0, 0])
    torch.testing.assert_close(value("within", p.log(), EQUAL), value("within", shifted.log(), EQUAL), **FLOAT64)


def test_the_gradient_sums_to_zero_inside_each_cluster() -> None:
    """dV/dP, through the means of one token's probabilities."""
    p = random(1).softmax(-1).squeeze(0).requires_grad_()
    # the objective sees log p, whose softmax is p; along the simplex the gradients agree up to a constant a cluster
    found = torch.autograd.grad(reference.within(p, EQUAL), p)[0]
    torch.testing.assert_close(found.view(4, 2).sum(-1), torch.zeros(4, dtype=torch.float64), **FLOAT64)
    logits = p.detach().log()[None].requires_grad_()
    through = torch.autograd.grad(value("within", logits, EQUAL), logits)[0].squeeze(0)
    torch.testing.assert_close(through, (p * (found - (p * found).sum())).detach(), **FLOAT64)


@pytest.mark.parametrize("kind", KINDS)
def test_permutations_inside_and_of_whole_clusters_change_nothing(kind: str) -> None:
    logits, want = random(), value(kind, random(), EQUAL)
    for order in ([1, 0, 2, 3, 5, 4, 7, 6], [4, 5, 6, 7, 2, 3, 0, 1]):
        torch.testing.assert_close(value(kind, logits[:, order], EQUAL), want, **FLOAT64)
    if kind != "all":
        assert not torch.isclose(value(kind, logits[:, [0, 2, 1, 3, 4, 5, 6, 7]], EQUAL), want)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_twice_costs_the_same(kind: str) -> None:
    once = value(kind, random(), EQUAL)
    torch.testing.assert_close(value(kind, random().repeat(2, 1), EQUAL), once, **FLOAT64)


@pytest.mark.parametrize("kind", KINDS)
def test_absent_experts_count_nowhere(kind: str) -> None:
    """A cluster that lost one expert and one that lost all are as if they had never had them."""
    logits = random().index_fill(1, torch.tensor([1, 4, 5]), -torch.inf).requires_grad_()
    have = value(kind, logits, EQUAL)
    want = value(kind, random()[:, [0, 2, 3, 6, 7]], [[0], [1, 2], [3, 4]])
    torch.testing.assert_close(have, want, **FLOAT64)
    gradient = torch.autograd.grad(have, logits)[0]
    assert torch.isfinite(gradient).all() and not gradient[:, [1, 4, 5]].any()


def test_no_tokens_cost_nothing() -> None:
    for kind in KINDS:
        assert value(kind, random()[:0], EQUAL) == 0


def test_clusters_move_with_their_experts() -> None:
    moe = layer(EQUAL)
    assert moe.cluster is not None
    moe.reindex(torch.tensor([7, 0, -1, 3, 4, 5, 6, 1, 2, -1]))
    assert moe.cluster.tolist() == [3, 0, 1, 1, 2, 2, 3, 0, 1, 3]


@pytest.mark.parametrize(
    ("clusters", "message"),
    [
        (3, "clusters=3, allowed: a divisor of 8, the number of experts"),
        (0, "clusters=0, allowed: a divisor of 8"),
        ([0, 0, 1], r"clusters=\[0, 0, 1\], allowed: for each of 8 experts one of 0, 1, ..., m"),
        ([0, 0, 2, 2, 0, 0, 0, 0], "allowed: for each of 8 experts"),
        ([], "allowed: for each of 8 experts"),
    ],
)
def test_impossible_clusters_are_refused(clusters: int | list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoELayer(ScoredRouter(LinearScore(4, 8), TopK(1)), [CopyBank(8)], clusters=clusters)


def test_values_are_checked() -> None:
    with pytest.raises(ValueError, match="form='x', allowed: all, within, gap, token_gap"):
        ClusterVariance("x")  # type: ignore[arg-type]
    bare = MoELayer(ScoredRouter(LinearScore(4, 8), TopK(1)), [CopyBank(8)])
    with pytest.raises(ValueError, match="cluster_variance found a layer without clusters"):
        ClusterVariance()(bare(torch.zeros(3, 4))[1][0])

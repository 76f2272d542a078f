"""Top-K and Top-P as HMoE defines them (checks 5 and 12 of the list in test_hmoe.py)."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moestro.routers import LinearScore, ScoredRouter, Select, TopK, TopP
from moestro.routing import SparseRouting
from tests.reference import hmoe
from tests.systems.hmoe_layers import D, make_layer, random
from tests.tolerances import FLOAT64

close = torch.testing.assert_close


def chosen_sets(logits: Tensor, select: Select) -> list[set[int]]:
    routing = select(logits)
    assert isinstance(routing, SparseRouting)
    sets: list[set[int]] = [set() for _ in range(len(logits))]
    for t, e in zip(routing.token.tolist(), routing.expert.tolist(), strict=True):
        assert e not in sets[t]
        sets[t].add(e)
    return sets


def test_top_p_chooses_different_numbers_for_different_tokens() -> None:
    layer = make_layer([1, 3, 4, 5, 8], TopP(0.6))
    _, (trace,) = layer(random(40, D))
    assert len(set(trace.experts_per_token().tolist())) >= 3


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.6, 0.9, 0.999])
def test_top_p_is_the_shortest_prefix_that_reaches_the_threshold(threshold: float) -> None:
    logits = 2 * random(200, 8)
    probs = logits.softmax(-1)
    for p, members in zip(probs, chosen_sets(logits, TopP(threshold)), strict=True):
        assert members == set(hmoe.top_p(p, threshold))
        inside = sorted((float(p[i]) for i in members), reverse=True)
        outside = [float(p[i]) for i in range(8) if i not in members]
        assert sum(inside) >= threshold - 1e-12 and sum(inside[:-1]) < threshold
        assert not outside or min(inside) >= max(outside)


def test_top_p_limits() -> None:
    logits = 3 * random(100, 8)
    first = [{int(i)} for i in logits.argmax(-1)]
    assert chosen_sets(logits, TopP(0.0)) == first
    assert chosen_sets(logits, TopP(1e-9)) == first
    assert chosen_sets(logits, TopP(1.0)) == [set(range(8))] * 100
    # saturated probabilities: the total rounds to less or more than one, and 1.0 still means all
    assert chosen_sets(1000 * random(20, 8), TopP(1.0)) == [set(range(8))] * 20


def test_top_p_is_top_1_where_one_probability_reaches_the_threshold() -> None:
    logits = 2 * random(300, 8)
    sure = logits.softmax(-1).amax(-1) >= 0.6
    assert 20 < int(sure.sum()) < 280
    for is_sure, members in zip(sure.tolist(), chosen_sets(logits, TopP(0.6)), strict=True):
        assert (len(members) == 1) == is_sure


def test_top_p_counts_a_mass_that_equals_the_threshold_as_reached() -> None:
    assert chosen_sets(torch.zeros(1, 4, dtype=torch.float64), TopP(0.5)) == [{0, 1}]


def test_top_p_grows_with_the_threshold() -> None:
    logits = 2 * random(100, 8)
    previous = chosen_sets(logits, TopP(0.0))
    for threshold in (0.1, 0.25, 0.5, 0.75, 0.9, 1.0):
        current = chosen_sets(logits, TopP(threshold))
        assert all(small <= large for small, large in zip(previous, current, strict=True))
        previous = current


@pytest.mark.parametrize("select", [TopK(1), TopK(3), TopP(0.4), TopP(0.6), TopP(1.0)])
def test_gates_sum_to_one_over_the_chosen(select: Select) -> None:
    dense = select(3 * random(50, 8)).dense()
    close(dense.sum(-1), torch.ones(50, dtype=torch.float64), **FLOAT64)


@pytest.mark.parametrize(("select", "expected"), [(TopK(3), {0, 1, 2}), (TopP(0.4), {0, 1, 2, 3})])
def test_ties_go_to_the_lower_expert(select: Select, expected: set[int]) -> None:
    logits = torch.zeros(50, 8, dtype=torch.float64)
    assert chosen_sets(logits, select) == [expected] * 50


@pytest.mark.parametrize("make", [lambda: TopK(0), lambda: TopP(-0.1), lambda: TopP(1.1), lambda: TopP(math.nan)])
def test_impossible_selections_are_refused(make: Callable[[], Select]) -> None:
    with pytest.raises(ValueError, match="allowed"):
        make()


def test_more_choices_than_experts_are_refused() -> None:
    with pytest.raises(ValueError, match="top_k=4 > 3 experts"):
        ScoredRouter(LinearScore(D, 3), TopK(4))

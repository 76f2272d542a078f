"""Which rank each expert lives on: bounds that theorems promise, and optima found by trying everything."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moestro.experts.widths import arithmetic, groups, pairs
from moestro.parallel.placement import (
    Blocks,
    EqualCount,
    EverySize,
    Exact,
    Greedy,
    Placement,
    Strategy,
    tokens_times_width,
)

ANY = (EqualCount(), Greedy(), Exact())


@st.composite
def experts_and_ranks(draw: st.DrawFn) -> tuple[list[int], int]:
    """What up to 6 experts cost, nothing included, and a number of ranks."""
    work = draw(st.lists(st.integers(0, 30), min_size=1, max_size=6))
    return work, draw(st.integers(1, min(3, len(work))))


def optimum(work: list[int], n_ranks: int) -> float:
    """The least work of the busiest rank over all placements that leave no rank empty."""
    every = (rank for rank in product(range(n_ranks), repeat=len(work)) if len(set(rank)) == n_ranks)
    return min(max(Placement(rank, n_ranks).per_rank(work)) for rank in every)


def busiest(strategy: Strategy, work: list[int], n_ranks: int) -> float:
    return max(strategy(work, work, n_ranks).per_rank(work))


@given(experts_and_ranks())
def test_every_expert_has_one_rank_and_every_rank_an_expert(case: tuple[list[int], int]) -> None:
    work, n_ranks = case
    for strategy in ANY:
        placed = strategy(work, work, n_ranks)
        assert sorted(e for held in placed.experts for e in held) == list(range(len(work)))
        assert all(held for held in placed.experts)
        assert all(placed.rank[e] == r for r, held in enumerate(placed.experts) for e in held)
        assert sum(placed.per_rank(work)) == sum(work) and placed.imbalance(work) >= 1


@given(experts_and_ranks())
def test_exact_is_the_optimum_and_greedy_within_its_bound(case: tuple[list[int], int]) -> None:
    work, n_ranks = case
    best = optimum(work, n_ranks)
    assert busiest(Exact(), work, n_ranks) == best and Exact().solved(work, work, n_ranks)[1]
    assert busiest(Greedy(), work, n_ranks) <= (4 / 3 - 1 / (3 * n_ranks)) * best + 1e-9


@given(experts_and_ranks(), st.integers(1, 20))
def test_a_search_that_is_cut_short_is_no_worse_than_greedy(case: tuple[list[int], int], nodes: int) -> None:
    work, n_ranks = case
    assert busiest(Exact(nodes), work, n_ranks) <= busiest(Greedy(), work, n_ranks)


def test_a_search_that_is_cut_short_says_so() -> None:
    work = [float(7919 * i % 997) for i in range(40)]
    assert not Exact(50).solved(work, work, 6)[1]


def test_where_greedy_is_not_best_the_search_is() -> None:
    work = [3, 3, 2, 2, 2]
    assert busiest(Greedy(), work, 2) == 7 and busiest(Exact(), work, 2) == 6


def test_widths_of_hmoe_balance_better_by_work_than_by_count() -> None:
    widths = [9, 11, 13, 15, 17, 19, 21, 23]
    work = tokens_times_width([8, 7, 6, 5, 4, 3, 2, 1], [float(width) for width in widths])
    figures = [strategy(work, widths, 4).imbalance(work) for strategy in ANY]
    assert figures[0] > figures[1] >= figures[2] >= 1
    assert EqualCount()(widths, widths, 4).experts == ((0, 1), (2, 3), (4, 5), (6, 7))


@pytest.mark.parametrize("n_ranks", [2, 4])
def test_pairs_stay_together_and_ranks_hold_the_same(n_ranks: int) -> None:
    widths = pairs(30_720)
    placed = Blocks(2)(widths, widths, n_ranks)
    assert all(placed.rank[2 * pair] == placed.rank[2 * pair + 1] for pair in range(4))
    assert set(placed.per_rank(widths)) == {30_720 // n_ranks}
    work = [9, 0, 1, 1, 1, 1, 8, 1]
    assert sorted(Blocks(2)(work, widths, 4).per_rank(work)) == [2, 2, 9, 9]


@pytest.mark.parametrize("n_ranks", [2, 4])
def test_every_rank_holds_every_size_of_a_group(n_ranks: int) -> None:
    widths = groups([(4, 16), (8, 48), (4, 112)])
    for held in EverySize()(widths, widths, n_ranks).experts:
        counts = {width: sum(widths[expert] == width for expert in held) for width in (16, 48, 112)}
        assert counts == {16: 4 // n_ranks, 48: 8 // n_ranks, 112: 4 // n_ranks}


def test_within_a_size_the_busiest_experts_are_kept_apart() -> None:
    widths = groups([(4, 64), (2, 128)])
    work = [7.0, 1.0, 1.0, 1.0, 5.0, 5.0]
    placed = EverySize()(work, widths, 2)
    assert placed.per_rank(work) == [13, 7] and placed.imbalance(work) == 1.3


def test_arithmetic_widths_fold() -> None:
    widths = arithmetic(8, 512, 4)
    assert Blocks(1)(widths, widths, 4).experts == ((0, 7), (1, 6), (2, 5), (3, 4))


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (lambda: Greedy()([1, 2], [1, 2], 3), "n_ranks=3, allowed: 1 to 2"),
        (lambda: Greedy()([1, float("nan")], [1, 2], 2), "work or width nan"),
        (lambda: Greedy()([1, -2.0], [1, 2], 2), "work or width -2.0"),
        (lambda: Greedy()([1], [1, 2], 1), "work of 1 experts and widths of 2"),
        (lambda: Blocks(2)([1] * 6, [1] * 6, 2), "6 experts in blocks of together=2 do not divide among 2 ranks"),
        (lambda: EverySize()([1] * 3, [4, 4, 8], 2), "1 experts of width 8 do not divide among 2 ranks"),
        (lambda: Placement((0, 0), 2), r"ranks \[1\] of 2 have no expert"),
        (lambda: Placement((0, 2), 2), "allowed: ranks 0 to 1"),
        (lambda: Exact(0), "nodes=0"),
        (lambda: Blocks(0), "together=0"),
    ],
)
def test_the_impossible_is_refused(place, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        place()

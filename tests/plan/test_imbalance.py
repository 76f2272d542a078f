"""Loads of ranks: simulated ones are what probabilities say, measured ones are taken as they are."""

import numpy as np
import pytest

from moestro.plan.imbalance import EVEN, balance, compared, popularity, simulated_loads
from moestro.plan.workload import Mixture

UNEQUAL = Mixture("blocks.0.ffn.branches.0", (8.0, 16.0, 24.0, 32.0, 40.0, 48.0, 56.0, 64.0), (1.0,) * 8, 1.0, 2)
WIDE = Mixture("blocks.1.ffn.branches.0", (4.0,) * 8, (2.0,) * 8, 1.0, 1)


def test_popularity_follows_zipf_s_law_in_random_order():
    shares = popularity(4, 1.0, np.random.default_rng(0))
    assert sorted(shares, reverse=True) == pytest.approx([12 / 25, 6 / 25, 4 / 25, 3 / 25])
    assert popularity(4, 0.0, np.random.default_rng(0)).tolist() == [0.25] * 4


def test_loads_add_up_to_the_rows_of_all_tokens():
    loads = simulated_loads(UNEQUAL, 100, 0.5, seed=3)
    assert {sum(load) for load in loads} == {200.0}
    assert loads == simulated_loads(UNEQUAL, 100, 0.5, seed=3) != simulated_loads(UNEQUAL, 100, 0.5, seed=4)


def test_one_rank_and_equal_loads_are_balanced():
    assert balance([UNEQUAL], 1, 1000, 1.0) == EVEN
    assert balance([], 4, 1000, 1.0) == EVEN
    assert balance([WIDE], 4, 10**7, 0.0).work == pytest.approx(1.0, abs=0.01)


def test_more_skew_is_less_balance():
    works = [balance([UNEQUAL], 4, 10**5, skew).work for skew in (0.0, 0.3, 1.0)]
    assert works == sorted(works) and works[2] > 1.3 > 1.02 > works[0]


def test_measured_loads_are_those_of_the_bank_s_layer():
    # by load: 80 rows times width 4 alone against seven experts of 4 rows each, whatever the seed
    measured = {"blocks.1.ffn": [80.0, 4, 4, 4, 4, 4, 4, 4]}
    found = balance([WIDE], 2, 10, 5.0, measured)
    assert found.work == pytest.approx(80 / 54)
    assert balance([UNEQUAL], 2, 1000, 0.1, measured) == balance([UNEQUAL], 2, 1000, 0.1)


def test_parameters_of_the_fullest_rank_count_all_layers():
    lopsided = Mixture("a.branches.0", (1.0, 1.0, 2.0), (1.0, 1.0, 2.0), 1.0, 1)
    assert balance([lopsided], 2, 10, 0.0).parameters == 1.0
    odd = Mixture("a.branches.0", (1.0, 1.0, 1.0), (1.0, 1.0, 1.0), 1.0, 1)
    assert balance([odd, odd], 2, 10, 0.0).parameters == pytest.approx(2 / 1.5)


def test_placements_by_what_is_known_get_better_with_knowledge():
    load = [10.0, 1, 1, 1, 1, 1, 1, 10]
    found = compared(UNEQUAL, 2, before=load, after=load)
    assert found["by load"] <= found["by width"] and found["by load"] <= found["equal count"]
    # by number: 36 * rows on one, 208 and more on the other
    assert found["equal count"] == pytest.approx((40 + 48 + 56 + 640) / ((80 + 16 + 24 + 32 + 40 + 48 + 56 + 640) / 2))

"""Which experts to remove: exact search, genetic search."""

import itertools

import pytest

from moestro.compress.damage import Damage
from moestro.compress.search import Choice, Genetic, least_damage
from tests.compress.layers import matrices, small_layer, tokens
from tests.reference.expert_removal import damage as reference_damage


def test_nothing_is_searched_where_nothing_is_removed():
    def never(subset):
        raise AssertionError("called")

    assert least_damage(never, Choice(8, 0)).subsets == [()]


@pytest.mark.parametrize("n_removed", [2, 4])
def test_genetic_search_finds_what_enumeration_finds(n_removed):
    layer = small_layer(8)
    damage, choice = Damage(layer, tokens(60)), Choice(8, n_removed)
    exact = least_damage(damage, choice, n_best=3)
    searched = least_damage(damage, choice, enumerable=0, genetic=Genetic(20, 15), seed=3)
    assert exact.exhaustive and not searched.exhaustive
    assert searched.subsets[0] == exact.subsets[0] and searched.damages[0] == exact.damages[0]
    every = [reference_damage(layer.router.score.weight.detach(), matrices(layer), tokens(60), 2, removed)
             for removed in itertools.combinations(range(8), n_removed)] if n_removed == 2 else None  # fmt: skip
    assert every is None or exact.damages == pytest.approx(sorted(every)[:3], rel=1e-9)


def hidden(subset):
    """A damage with structure: the experts that matter are those with few bits."""
    return sum(1 / (1 + (expert * 7 % 31)) for expert in subset)


def test_the_search_is_the_same_for_the_same_seed_and_never_forgets_its_best():
    choice, genetic = Choice(40, 10), Genetic(40, 20)
    one, same, other = (least_damage(hidden, choice, 3, seed=s, genetic=genetic) for s in (5, 5, 6))
    assert one == same and one.history != other.history
    assert all(a >= b for a, b in itertools.pairwise(one.history))
    assert len(set(one.subsets)) == 3 and one.damages == sorted(one.damages)
    assert all(len(set(subset)) == 10 and list(subset) == sorted(subset) for subset in one.subsets)
    assert one.history[-1] < one.history[0] and one.damages[0] == one.history[-1]


def test_every_routing_group_gives_up_as_many():
    choice = Choice(12, 6, groups=3)
    assert choice.count == 6**3 == len(list(choice.all()))
    found = least_damage(hidden, choice, enumerable=0, genetic=Genetic(10, 5))
    for subset in [*choice.all(), *found.subsets]:
        assert [sum(e // 4 == group for e in subset) for group in range(3)] == [2, 2, 2]
    with pytest.raises(ValueError, match="must divide"):
        Choice(12, 4, groups=3)


def test_too_many_subsets_are_refused_where_no_search_is_allowed():
    with pytest.raises(ValueError, match="53194089192720 subsets of 15 of 60"):
        least_damage(hidden, Choice(60, 15))


def test_impossible_searches_are_refused():
    with pytest.raises(ValueError, match="0 to 7"):
        Choice(8, 8)
    with pytest.raises(ValueError, match="n_best"):
        least_damage(hidden, Choice(8, 2), n_best=0)
    with pytest.raises(ValueError, match="population from 2"):
        Genetic(1)

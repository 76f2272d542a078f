"""Grouping experts: exact where it can be, average linkage beyond."""

import pytest
import torch

from moestro.compress.partition import agglomerate, group_experts, partitions, stirling, within
from tests.reference.expert_similarity import best_partition


def similarities(n, seed=0):
    values = torch.rand(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (values + values.T).div(2).fill_diagonal_(1)


def blocks(sizes, inside=0.9, across=0.1):
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    same = torch.tensor([[a == b for a in labels] for b in labels])
    return torch.where(same, inside, across).double().fill_diagonal_(1)


@pytest.mark.parametrize(("n", "k", "count"), [(8, 6, 266), (8, 5, 1050), (8, 4, 1701), (4, 4, 1), (3, 1, 1)])
def test_there_are_as_many_partitions_as_stirling_says(n, k, count):
    found = list(partitions(n, k))
    assert stirling(n, k) == count == len(found) == len({tuple(groups) for groups in found})
    assert all(sorted(e for group in groups for e in group) == list(range(n)) for groups in found)


@pytest.mark.parametrize(("n", "k"), [(5, 3), (6, 2), (6, 4)])
def test_the_best_partition_is_that_of_brute_force(n, k):
    for seed in range(3):
        alike = similarities(n, seed)
        found = group_experts(alike, k)
        assert within(alike.tolist(), found) == pytest.approx(best_partition(alike.tolist(), k), rel=1e-12)


@pytest.mark.parametrize("solver", ["exact", "linkage"])
def test_blocks_are_found(solver):
    alike = blocks([3, 2, 2, 1])
    found = group_experts(alike, 4) if solver == "exact" else agglomerate([alike], 4)[0]
    assert found == [(0, 1, 2), (3, 4), (5, 6), (7,)]


def test_many_experts_go_by_linkage():
    alike = blocks([8] * 8)
    assert stirling(64, 8) > 10**6
    assert group_experts(alike, 8) == [tuple(range(8 * g, 8 * g + 8)) for g in range(8)]


def test_ties_are_decided_alike_and_all_groups_are_possible():
    alike = torch.ones(5, 5, dtype=torch.float64)
    assert group_experts(alike, 4) == group_experts(alike, 4)
    assert group_experts(alike, 5) == [(0,), (1,), (2,), (3,), (4,)]
    assert group_experts(alike, 1) == [(0, 1, 2, 3, 4)]
    assert agglomerate([alike], 4)[0] == [(0, 1), (2,), (3,), (4,)]


def test_groups_may_have_a_largest_size():
    alike = blocks([4, 1, 1])
    assert max(map(len, group_experts(alike, 3, largest=2))) == 2
    assert max(map(len, agglomerate([alike], 3, largest=2)[0])) == 2
    with pytest.raises(ValueError, match="do not hold"):
        group_experts(alike, 2, largest=2)


def test_one_budget_for_all_layers_merges_what_is_most_alike_anywhere():
    alike = [blocks([2, 2], inside=0.9), blocks([2, 2], inside=0.5), similarities(4) * 0.01]
    found = agglomerate(alike, 9)
    assert [len(groups) for groups in found] == [2, 3, 4]
    assert [len(groups) for groups in agglomerate(alike, 9, least=3)] == [3, 3, 3]
    with pytest.raises(ValueError, match="least=3"):
        agglomerate(alike, 8, least=3)

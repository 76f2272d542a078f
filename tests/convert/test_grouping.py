"""Groupings: permutations with the sizes asked for, and each what its name says."""

import pytest
import torch

from moestro.convert.grouping import BalancedKMeans, CoActivation, Importance, Shuffled, assigned, equal_importance
from moestro.convert.network import Network
from moestro.convert.seen import Seen
from tests.convert.networks import D, W, drawn, network, seen
from tests.convert.test_factorllm import GROUPINGS


@pytest.mark.parametrize("widths", [[4, 4, 4], [1, 2, 9], [12]])
@pytest.mark.parametrize("grouping", GROUPINGS, ids=repr)
def test_every_unit_is_dealt_once(grouping, widths):
    order = grouping(seen(tokens=30), widths)
    assert sorted(order.tolist()) == list(range(W))
    assert torch.equal(order, grouping(seen(tokens=30), widths))


def clustered() -> Seen:
    """Units of three directions, shuffled: unit u looks along axis u % 3, and is active where that is positive."""
    up = torch.zeros(W, D, dtype=torch.float64)
    up[torch.arange(W), torch.arange(W) % 3] = torch.linspace(1, 2, W, dtype=torch.float64)
    return Seen(Network("relu", up, drawn(W, D, seed=2)), drawn(400, D, seed=3))


@pytest.mark.parametrize(
    "grouping", [BalancedKMeans(), BalancedKMeans(on="activations"), CoActivation(share=0.5)], ids=repr
)
def test_units_that_belong_together_end_up_together(grouping):
    groups = grouping(clustered(), [4, 4, 4]).view(3, 4)
    assert {frozenset((group % 3).tolist()) for group in groups} == {frozenset({0}), frozenset({1}), frozenset({2})}


def test_clusters_have_exactly_the_sizes_asked_for():
    cluster = assigned(torch.rand(50, 4, generator=torch.Generator().manual_seed(0)), [1, 9, 20, 20])
    assert torch.bincount(cluster).tolist() == [1, 9, 20, 20]
    # with room everywhere, each takes its nearest
    distance = torch.rand(50, 3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(assigned(distance, [50, 50, 50]), distance.argmin(1))


def test_importance_is_the_mean_length_of_what_a_unit_adds():
    of = seen(tokens=30)
    hidden, down = of.network.hidden(of.x), of.network.down
    want = torch.stack([(hidden[:, u, None] * down[u]).norm(dim=1).mean() for u in range(W)])
    torch.testing.assert_close(of.importance(), want)
    order = Importance()(of, [6, 6])
    assert (of.importance()[order].diff() <= 0).all()
    dealt = Importance(dealt=True)(of, [6, 6]).view(2, 6)
    sums = of.importance()[dealt].sum(1)
    assert float(sums.max() / sums.min()) < 1.35


def test_another_seed_is_another_shuffle():
    of = seen()
    assert not torch.equal(Shuffled()(of, [12]), Shuffled()(Seen(of.network, of.x, seed=1), [12]))


def test_widths_share_importance_evenly():
    importance = torch.tensor([8.0, 4, 4, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1])
    assert equal_importance(4, importance, 15) == [1, 2, 4, 8]
    assert equal_importance(3, torch.ones(12), 12) == [4, 4, 4]
    # one unit that is everything still leaves one for each of the others
    assert equal_importance(3, torch.tensor([1.0, 0, 0, 0]), 4) == [1, 1, 2]
    assert sum(equal_importance(4, torch.rand(64), 64, multiple_of=4)) == 64
    with pytest.raises(ValueError, match=r"multiple_of=5: 12 units do not make n_experts=2"):
        equal_importance(2, torch.ones(12), 12, 5)


def test_unknown_words_are_refused():
    with pytest.raises(ValueError, match=r"on='rows', allowed: weights, activations"):
        BalancedKMeans(on="rows")
    with pytest.raises(ValueError, match=r"share=0.0, allowed"):
        CoActivation(share=0.0)
    assert network().width == W

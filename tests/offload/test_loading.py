"""Pins, scratch, prefetch, giving up, on a virtual clock."""

from dataclasses import replace

import pytest

from moestro.offload.cache import SlotCache
from moestro.offload.loader import Loader
from moestro.offload.policies import SINGLE, Mix, Records
from moestro.offload.replay import Setting, Sizes, Timing, budget, replay
from moestro.offload.scorer import Precision, Thresholds
from moestro.offload.trace import Header
from moestro.offload.transport import AHEAD, DEMAND, Job, VirtualTransport
from moestro.offload.tuning import prediction_accuracy, profile_thresholds, shares, tune_low_share, tune_mix
from tests.offload.traces import made_up

HIGH, LOW, SKIP = Precision.HIGH, Precision.LOW, Precision.SKIP


def loader_of(slots: int, transport: VirtualTransport, depth: int = 0, high: list | None = None, **options) -> Loader:
    high = high or [[8] * 4] * 3
    header = Header("", high, [[2] * len(layer) for layer in high], 2)
    cache = SlotCache({HIGH: 8 * slots, LOW: 4}, SINGLE["lru"], len(high), Records())
    return Loader(cache, Sizes(header), transport, depth, **options)


def test_a_virtual_channel_keeps_time() -> None:
    channel = VirtualTransport(bandwidth=10, latency=1, block=4)
    first = channel.submit(Job((0, 0), HIGH, 8), AHEAD)
    second = channel.submit(Job((0, 1), HIGH, 8), DEMAND)
    assert not channel.arrived(first)
    channel.wait(second)
    # a latency and two blocks; what was asked for ahead waited
    assert channel.now == pytest.approx(1.8) and not channel.arrived(first)
    channel.compute(5)
    assert channel.arrived(first) and channel.now == pytest.approx(6.8) and channel.waited == pytest.approx(1.8)
    third = channel.submit(Job((0, 2), HIGH, 10), DEMAND)
    channel.wait(third)
    assert channel.now == pytest.approx(6.8 + 1 + 1)


def test_a_running_fetch_gives_way_and_stops_at_the_end_of_its_block() -> None:
    channel = VirtualTransport(bandwidth=1, block=2)
    slow = channel.submit(Job((1, 0), HIGH, 10), AHEAD)
    channel.compute(3)
    quick = channel.submit(Job((0, 0), HIGH, 1), DEMAND)
    channel.wait(quick)
    # two blocks of the fetch had begun: the second ends at 4
    assert channel.now == pytest.approx(5) and slow.moved == 4
    channel.compute(0.5)
    channel.cancel(slow)
    channel.compute(20)
    assert slow.cancelled and not slow.done and slow.moved == 6


def test_pinned_experts_stay_and_demand_goes_through_scratch() -> None:
    loader = loader_of(1, VirtualTransport())
    assert [s.scratch for s in loader.serve(0, {0: HIGH})] == [False]
    seen = []
    for served in loader.serve(0, {0: HIGH, 2: HIGH, 3: HIGH}):
        seen.append((served.expert, served.scratch))
    # 0 is pinned until it has computed, then its slot serves 2 and 3 in turn
    assert seen == [(0, False), (2, False), (3, False)]
    none = loader_of(0, VirtualTransport())
    assert [(s.expert, s.scratch) for s in none.serve(0, {0: HIGH, 1: HIGH})] == [(0, True), (1, True)]
    assert none.counts.scratch == 2 and none.counts.demanded == 16


def test_expected_experts_are_never_evicted_and_prefetch_is_refused_without_room() -> None:
    loader = loader_of(2, VirtualTransport(), depth=2)
    list(loader.serve(0, {0: HIGH}, [(1, {1: HIGH})]))
    assert set(loader.cache.pools[HIGH].held) == {(0, 0), (1, 1)} and loader.counts.fetched_ahead == 8
    # a second pass starts at layer 0: what was expected of layer 1 is still pinned
    serving = loader.serve(0, {2: HIGH}, [(1, {1: HIGH, 3: HIGH})])
    next(serving)
    assert set(loader.cache.pools[HIGH].held) == {(0, 2), (1, 1)} and loader.counts.refused == 1
    with pytest.raises(StopIteration):
        next(serving)
    # 3 of layer 1 takes the slot of layer 0, 1 stays pinned as expected
    assert [(s.expert, s.scratch) for s in loader.serve(1, {1: HIGH, 3: HIGH})] == [(1, False), (3, False)]
    assert loader.counts.ahead == 1 and not loader.cache.pinned


def test_demand_that_finds_every_slot_expected_is_served_through_scratch() -> None:
    loader = loader_of(1, VirtualTransport(), depth=1, high=[[8] * 4] * 3)
    loader.cache.admit((2, 0), HIGH, 8, 0)
    loader.cache.pinned.add((2, 0))
    assert [s.scratch for s in loader.serve(0, {1: HIGH})] == [True]
    assert set(loader.cache.pools[HIGH].held) == {(2, 0)} and loader.counts.scratch == 1


def test_the_first_layer_that_lacks_something_is_fetched_and_no_further() -> None:
    loader = loader_of(4, VirtualTransport(), depth=2)
    list(loader.serve(0, {0: HIGH}, [(1, {0: HIGH}), (2, {0: HIGH})]))
    assert {(1, 0)} == set(loader.cache.pools[HIGH].held) - {(0, 0)}
    list(loader.serve(0, {0: HIGH}, [(1, {0: HIGH}), (2, {0: HIGH})]))
    assert (2, 0) in loader.cache.pools[HIGH].held


def test_a_wrong_fetch_is_given_up_when_its_layer_comes() -> None:
    channel = VirtualTransport(bandwidth=1, block=2)
    loader = loader_of(3, channel, depth=1)
    for _ in loader.serve(0, {0: HIGH}, [(1, {1: HIGH, 2: HIGH})]):
        channel.compute(1)
    # its first block is under way, the other fetch waits
    list(loader.serve(1, {2: HIGH}))
    assert (loader.counts.cancelled, loader.counts.wasted, loader.counts.late) == (1, 8, 1)
    assert set(loader.cache.pools[HIGH].held) == {(0, 0), (1, 2)}
    assert channel.moved == 8 + 2 + 8 and channel.now == pytest.approx(8 + 2 + 8)


def test_precisions_are_served_by_what_is_cached() -> None:
    loader = loader_of(1, VirtualTransport())
    list(loader.serve(0, {0: LOW}))
    assert loader.cache.serving((0, 0), HIGH) is None and loader.cache.serving((0, 0), SKIP) is LOW
    assert [s.precision for s in loader.serve(0, {0: SKIP, 1: SKIP})] == [LOW]
    list(loader.serve(0, {0: HIGH}))
    assert [s.precision for s in loader.serve(0, {0: LOW})] == [HIGH]
    assert loader.counts.rates()["hit_rate"] == pytest.approx(2 / 4)


def test_the_cooperative_mode_computes_misses_where_they_lie() -> None:
    channel = VirtualTransport(bandwidth=1)
    loader = loader_of(2, channel, cooperative=True)
    assert [(s.expert, s.in_place) for s in loader.serve(0, {0: HIGH, 1: HIGH})] == [(0, True), (1, True)]
    assert channel.waited == 0
    channel.compute(16)
    assert [s.in_place for s in loader.serve(0, {0: HIGH, 1: HIGH})] == [False, False]
    assert loader.counts.in_place == 2


def test_experts_of_unequal_sizes_share_a_pool() -> None:
    loader = loader_of(2, VirtualTransport(), high=[[2, 6, 8, 16]])
    list(loader.serve(0, {0: HIGH}))
    list(loader.serve(0, {1: HIGH}))
    list(loader.serve(0, {2: HIGH}))
    assert loader.cache.pools[HIGH].used == 16
    # one large expert takes the place of three
    list(loader.serve(0, {3: HIGH}))
    assert set(loader.cache.pools[HIGH].held) == {(0, 3)}


def test_time_gained_over_loading_on_demand_grows_as_bandwidth_falls() -> None:
    trace = made_up(tokens=30)
    mixed = Setting({HIGH: 40, LOW: 8}, Mix(), Thresholds(0.4, 0.8))
    exact = Setting({HIGH: 48}, SINGLE["lru"])
    gains = []
    for bandwidth in (3000.0, 1000.0, 200.0):
        timing = Timing(bandwidth, expert=0.01, layer=0.005)
        plain, ours = replay(trace, exact, timing), replay(trace, mixed, timing)
        again = replay(trace, mixed, timing)
        assert (ours.seconds, ours.counts) == (again.seconds, again.counts)
        gains.append(plain.seconds / ours.seconds)
    assert 1 < gains[0] < gains[1] < gains[2]


def test_prefetch_hides_loading_behind_computing() -> None:
    trace = made_up(right=1.0)
    timing = Timing(bandwidth=100, expert=0.2)
    waits = [replay(trace, Setting({HIGH: 48}, depth=depth), timing).waited for depth in (0, 1)]
    assert waits[1] < 0.7 * waits[0]


def test_the_tuned_mix_is_never_worse_than_a_single_policy_on_its_trace() -> None:
    trace = made_up(seed=3)
    setting = Setting({HIGH: 40, LOW: 8}, thresholds=Thresholds(0.6, 0.9))
    mix, penalty = tune_mix(trace, setting, parts=2, rounds=1)
    singles = [
        replay(trace, Setting(setting.capacity, policy, setting.thresholds)).penalty for policy in SINGLE.values()
    ]
    assert penalty <= min(singles)
    assert penalty == replay(trace, Setting(setting.capacity, mix, setting.thresholds)).penalty


def test_a_profile_gives_the_shares_asked_for() -> None:
    trace = made_up(top_k=4, tokens=60)
    found = shares(trace, profile_thresholds(trace, 0.6, 0.3))
    assert found["high"] == pytest.approx(0.6, abs=0.02) and found["low"] == pytest.approx(0.3, abs=0.02)


def test_the_tuned_share_for_low_copies_moves_least_and_less_than_exact_loading() -> None:
    trace = made_up(top_k=2, tokens=60)
    thresholds, memory = profile_thresholds(trace), 64
    setting = Setting({}, thresholds=thresholds)
    share, moved = tune_low_share(trace, memory, setting)
    counts = [
        replay(trace, Setting(budget(trace.header, memory, part / 20), thresholds=thresholds)).counts
        for part in range(18)
    ]
    assert moved == min(each.moved / each.passes for each in counts)
    assert counts[round(20 * share)].moved / counts[0].passes == moved
    exact = replay(trace, Setting(budget(trace.header, memory, 0.0))).counts
    assert moved < exact.moved / exact.passes
    whole = replace(trace, header=replace(trace.header, low=trace.header.high))
    with pytest.raises(ValueError, match="record it without --exact"):
        tune_low_share(whole, memory, setting)
    with pytest.raises(ValueError, match="beside slots for LOW"):
        tune_low_share(trace, 7, setting)


def test_predictions_get_worse_with_distance() -> None:
    near, far = prediction_accuracy(made_up(tokens=200))
    assert near["distance"] == 1 and near["first"] == pytest.approx(0.7, abs=0.08)
    assert far["first"] == pytest.approx(0.49, abs=0.08) and far["recall"] < near["recall"]
    assert near["tokens"] == 2 * 200 * 2 and far["tokens"] == 2 * 200


def test_impossible_settings_are_refused() -> None:
    trace = made_up(depth=1)
    with pytest.raises(ValueError, match="1 layers ahead"):
        replay(trace, Setting({HIGH: 16}, depth=2))
    with pytest.raises(ValueError, match="do not hold one expert of 8 bytes"):
        budget(trace.header, 10, 0.5)
    with pytest.raises(ValueError, match="0 <= share < 1"):
        budget(trace.header, 10, 1.0)
    with pytest.raises(ValueError, match="prefetch depth -1"):
        loader_of(1, VirtualTransport(), depth=-1)

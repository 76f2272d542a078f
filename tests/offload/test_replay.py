"""The replay's decisions: counts computed by hand, and a replay written from the paper."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moestro.offload.cache import SlotCache
from moestro.offload.loader import Loader
from moestro.offload.policies import LCU, SINGLE, Mix, Records, policy_named
from moestro.offload.replay import Setting, Sizes, replay
from moestro.offload.scorer import Precision, Thresholds, thresholds_for, unimportance, wanted
from moestro.offload.trace import Header, Step, Trace
from moestro.offload.transport import VirtualTransport
from tests.reference import hobbit

HIGH, LOW, SKIP = Precision.HIGH, Precision.LOW, Precision.SKIP
ASKED = {"H": HIGH, "L": LOW, "-": SKIP}
POLICIES = {**SINGLE, "mix": Mix()}
# 8 bytes a HIGH copy, 2 a LOW one: ratio 1/4
BYTES = {"H": 8, "L": 2}


def served(
    passes: list, slots: dict, policy, n_layers: int, n_experts: int = 4, loader: Loader | None = None
) -> Loader:
    """The package's loader on requests as the reference takes them."""
    header = Header("", [[8] * n_experts] * n_layers, [[2] * n_experts] * n_layers, 1)
    if loader is None:
        capacity = {ASKED[name]: count * BYTES[name] for name, count in slots.items()}
        cache = SlotCache(capacity, policy, n_layers, Records())
        loader = Loader(cache, Sizes(header), VirtualTransport())
    loader.start_sequence()
    for layers in passes:
        for layer, wishes in layers:
            list(loader.serve(layer, {expert: ASKED[wish] for expert, wish in sorted(wishes)}))
    return loader


def one_layer(text: str) -> list:
    return [[(0, [(int(word[0]), word[1:] or "H")])] for word in text.split()]


TRACE_A = one_layer("0 0 1 2 0 1 0 2")
TRACE_B = [[(0, [(a, "H")]), (1, [(b, "H")])] for a, b in [(0, 0), (0, 1), (1, 0), (0, 0), (0, 1)]]
TRACE_C = one_layer("0H 1H 0L 0L 2H 0L 1H 2-")


@pytest.mark.parametrize(
    ("policy", "hits", "misses"), [("lru", 2, 6), ("lfu", 3, 5), ("lhu", 3, 5), ("fld", 2, 6), ("mix", 3, 5)]
)
def test_trace_a(policy: str, hits: int, misses: int) -> None:
    counts = served(TRACE_A, {"H": 2}, POLICIES[policy], 1).counts
    assert (counts.hits, counts.misses_high, counts.passes) == (hits, misses, 8)
    assert counts.penalty(0.25) == misses


@pytest.mark.parametrize(("policy", "evictions"), [("lru", [0, 1, 2, 1]), ("lfu", [1, 2, 1])])
def test_trace_a_evicts(policy: str, evictions: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    gone: list[int] = []
    monkeypatch.setattr(Sizes, "release", lambda self, key, precision: gone.append(key[1]))
    served(TRACE_A, {"H": 2}, POLICIES[policy], 1)
    assert gone == evictions


@pytest.mark.parametrize(
    ("policy", "hits", "misses"), [("lru", 3, 7), ("lfu", 4, 6), ("lhu", 4, 6), ("fld", 2, 8), ("mix", 4, 6)]
)
def test_trace_b(policy: str, hits: int, misses: int) -> None:
    counts = served(TRACE_B, {"H": 2}, POLICIES[policy], 2).counts
    assert (counts.hits, counts.misses_high) == (hits, misses)


@pytest.mark.parametrize(
    ("policy", "hits", "high", "low", "skips", "penalty"),
    [(name, 3, 4, 0, 1, 4) for name in ("lru", "lfu", "mix")] + [(name, 4, 3, 1, 0, 3.25) for name in ("lhu", "fld")],
)
def test_trace_c(policy: str, hits: int, high: int, low: int, skips: int, penalty: float) -> None:
    counts = served(TRACE_C, {"H": 2, "L": 1}, POLICIES[policy], 1).counts
    assert (counts.hits, counts.misses_high, counts.misses_low, counts.skips) == (hits, high, low, skips)
    assert counts.penalty(0.25) == penalty


def test_records_start_anew_and_the_cache_stays() -> None:
    loader = served(TRACE_A, {"H": 2}, SINGLE["lru"], 1)
    again = served(TRACE_A, {"H": 2}, SINGLE["lru"], 1, loader=loader).counts
    # the first pass leaves {0, 2}: the second one starts with a hit on 0 where it had a miss
    assert (again.hits, again.misses_high) == (2 + 3, 6 + 5)
    loader = served(TRACE_A, {"H": 2}, SINGLE["lru"], 1)
    loader.flush()
    cleared = served(TRACE_A, {"H": 2}, SINGLE["lru"], 1, loader=loader).counts
    assert (cleared.hits, cleared.misses_high) == (4, 12)


@pytest.mark.parametrize(("per_sequence", "known"), [(True, (0, 0, [])), (False, (2, 1, [(0, 1)]))])
def test_records_of_a_sequence_end_with_it(per_sequence: bool, known: tuple) -> None:
    """Passes, uses, and what the pass before used; model-level records go on."""
    records = Records(per_sequence)
    records.start_pass()
    records.use((0, 1), HIGH)
    records.start_pass()
    records.start_sequence()
    assert (records.token, records.of((0, 1)).uses, sorted(records.previous)) == known


wishes = st.lists(
    st.tuples(st.integers(0, 3), st.sampled_from("HL-")), min_size=1, max_size=3, unique_by=lambda w: w[0]
)
# of three layers: with two, the next one is as far as the one before
sequences = st.lists(st.tuples(wishes, wishes, wishes), min_size=1, max_size=12)


@given(sequences, st.integers(1, 5), st.integers(1, 3), st.sampled_from(sorted(POLICIES)), st.integers(1, 2))
def test_any_requests_as_in_the_paper(tokens: list, high: int, low: int, policy: str, repeats: int) -> None:
    passes = [list(enumerate(layers)) for layers in tokens]
    slots, loader, cache = {"H": high, "L": low}, None, None
    want = {"hits": 0, "high": 0, "low": 0, "skips": 0}
    for _ in range(repeats):
        loader = served(passes, slots, POLICIES[policy], 3, loader=loader)
        found = hobbit.replay(passes, slots, policy, 3, cache)
        cache = found["cache"]
        want = {name: want[name] + found[name] for name in want}
    counts = loader.counts
    assert want == {
        "hits": counts.hits,
        "high": counts.misses_high,
        "low": counts.misses_low,
        "skips": counts.skips,
    }
    held = {name: sorted(loader.cache.pools[ASKED[name]].held) for name in "HL"}
    assert held == {name: sorted(cache[name]) for name in "HL"}
    assert counts.requests == counts.hits + counts.misses_high + counts.misses_low + counts.skips
    assert not loader.cache.pinned


def test_scores_and_thresholds() -> None:
    for first in (0.55, 0.6, 0.7, 0.9, 0.95):
        (second,) = unimportance(torch.tensor([[first, 1 - first]], dtype=torch.float64))[0, 1:].tolist()
        assert second == pytest.approx(first)
    got = wanted(torch.tensor([[5, 2]]), torch.tensor([[0.75, 0.25]]), Thresholds(0.6, 0.9))
    assert got == {2: LOW, 5: HIGH} and list(got) == [2, 5]
    assert wanted(torch.tensor([[5, 2]]), torch.tensor([[0.5, 0.5]]), Thresholds(0.6, 0.9)) == {2: HIGH, 5: HIGH}
    assert wanted(torch.tensor([[5, 2]]), torch.tensor([[0.95, 0.05]]), Thresholds(0.6, 0.9)) == {2: SKIP, 5: HIGH}
    equal = wanted(torch.arange(8)[None], torch.full((1, 8), 0.01), Thresholds(0.6, 0.9))
    assert list(equal.values()) == [HIGH] * 5 + [LOW] * 3
    # several tokens: the most important request decides
    two = wanted(torch.tensor([[0, 1], [1, 0]]), torch.tensor([[0.95, 0.05], [0.7, 0.3]]), Thresholds(0.6, 0.9))
    assert two == {0: HIGH, 1: HIGH}
    assert wanted(torch.tensor([[3, 1]]), torch.tensor([[0.5, 0.5]]), Thresholds(0.0, 0.0)) == {1: SKIP, 3: HIGH}


@given(st.lists(st.floats(1e-3, 1), min_size=1, max_size=8), st.floats(0, 1), st.floats(0, 1))
def test_what_is_asked_as_in_the_paper(weights: list[float], a: float, b: float) -> None:
    t1, t2 = sorted((a, b))
    scores = unimportance(torch.tensor([weights], dtype=torch.float64))[0].tolist()
    assert scores == pytest.approx(hobbit.scores(weights))
    if min(abs(score - t) for score, t in product(scores, (t1, t2))) > 1e-9:
        asked = [Thresholds(t1, t2).precision(score) for score in scores]
        assert asked == [ASKED[wish] for wish in hobbit.asked(weights, t1, t2)]
    # T1 = 1 asks for everything, whatever the rounding of the sums
    assert set(wanted(torch.arange(len(weights))[None], torch.tensor([weights]), Thresholds()).values()) == {HIGH}


def test_what_cannot_be_scored_or_set_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        unimportance(torch.tensor([[float("nan"), 1.0]]))
    with pytest.raises(ValueError, match="T1=0.7, T2=0.6"):
        Thresholds(0.7, 0.6)
    with pytest.raises(ValueError, match="of sum 1"):
        Mix(0.5, 0.5, 0.5, 0.5)
    for text in ("best", "mix:1,2", "mix:a,b,c,d", "mix:1,1,0,0"):
        with pytest.raises(ValueError, match="mix"):
            policy_named(text)
    assert policy_named("mix:0.4,0.3,0.2,0.1").weights == (0.4, 0.3, 0.2, 0.1)
    assert isinstance(policy_named("lcu"), LCU)


def test_lcu_keeps_what_the_previous_pass_used() -> None:
    records = Records(ratio=0.125)
    for asked in ({(0, 0): HIGH, (1, 1): LOW}, {(0, 2): HIGH}):
        records.start_pass()
        for key, precision in asked.items():
            records.use(key, precision)
    policy = LCU()
    # T = 2: cost / T, and 1 / (distance + 0.1) for experts of the pass before
    assert policy.priority((0, 0), records, 0, 2) == pytest.approx(1 / 2 + 1 / 0.1)
    assert policy.priority((1, 1), records, 0, 2) == pytest.approx(0.125 / 2 + 1 / 1.1)
    assert policy.priority((0, 2), records, 0, 2) == pytest.approx(1 / 2)


def test_thresholds_for_shares() -> None:
    scores = [i / 100 for i in range(100)]
    found = thresholds_for(scores, 0.67, 0.30)
    asked = [found.precision(score) for score in scores]
    assert (asked.count(HIGH), asked.count(LOW), asked.count(SKIP)) == (67, 30, 3)
    assert thresholds_for(scores, 1, 0).exact
    with pytest.raises(ValueError, match="at most 1"):
        thresholds_for(scores, 0.8, 0.3)


def test_a_sequence_level_record_knows_only_its_sequence() -> None:
    """Two sequences of different experts: model-level counts keep the first one's in the cache."""
    steps = [Step(s, 0, torch.tensor([[e]]), torch.ones(1, 1)) for s, e in
             [(0, e) for e in [0, 0, 1, 1, 0, 0, 1, 1]] + [(1, e) for e in [2, 3, 2, 3, 2, 3]]]  # fmt: skip
    trace = Trace(Header("", [[8] * 4], [[2] * 4], 1), steps)
    setting = Setting({HIGH: 16}, SINGLE["lfu"])
    sequence = replay(trace, setting).counts
    model = replay(trace, Setting({HIGH: 16}, SINGLE["lfu"], per_sequence=False)).counts
    assert sequence.hits > model.hits

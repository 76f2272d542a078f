"""Replaying a recorded trace through a cache: hit rates, penalties and simulated time, without a model."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moestro.offload.cache import SlotCache
from moestro.offload.counts import Counts
from moestro.offload.loader import Expected, Loader
from moestro.offload.policies import SINGLE, Key, Policy, Records
from moestro.offload.scorer import Precision, Thresholds, wanted
from moestro.offload.trace import Header, Step, Trace
from moestro.offload.transport import Job, VirtualTransport


@dataclass(frozen=True)
class Setting:
    """How experts are served: bytes of each pool, policy, thresholds, prefetch depth, level of the records."""

    capacity: Mapping[Precision, int]
    policy: Policy = field(default=SINGLE["lru"])
    thresholds: Thresholds = field(default=Thresholds())
    depth: int = 0
    cooperative: bool = False
    per_sequence: bool = True


@dataclass(frozen=True)
class Timing:
    """Simulated speeds: bytes/s and s a copy of the slow tier, s to compute an expert and the rest of a layer."""

    bandwidth: float
    latency: float = 0.0
    expert: float = 0.0
    layer: float = 0.0


@dataclass(frozen=True)
class Replayed:
    """What a replay found; `seconds` and `waited` are simulated (0 without a `Timing`)."""

    counts: Counts
    ratio: float
    seconds: float = 0.0
    waited: float = 0.0

    @property
    def penalty(self) -> float:
        """Cost of the misses, in HIGH copies."""
        return self.counts.penalty(self.ratio)

    def as_json(self) -> dict[str, Any]:
        """For reports."""
        speed = {"simulated_seconds": self.seconds, "simulated_waited": self.waited}
        return {**self.counts.as_json(), "penalty": self.penalty, **speed}


@dataclass(frozen=True)
class Sizes:
    """Slots that hold no bytes."""

    header: Header

    def size(self, key: Key, precision: Precision) -> int:
        """Bytes of a copy."""
        return (self.header.high if precision is Precision.HIGH else self.header.low)[key[0]][key[1]]

    def take(self, key: Key, precision: Precision, scratch: bool = False) -> Job:
        """A job of that size."""
        return Job(key, precision, self.size(key, precision))

    def release(self, key: Key, precision: Precision) -> None:
        """Nothing to do."""


def replay(trace: Trace, setting: Setting, timing: Timing | None = None, clear: bool = False) -> Replayed:
    """Serve a trace's requests; `clear` empties the cache before every sequence.

    Raises: ValueError for a prefetch depth that the trace has no predictions for.
    """
    _check_depth(trace, setting.depth)
    records = Records(setting.per_sequence, trace.header.ratio)
    cache = SlotCache(setting.capacity, setting.policy, trace.header.n_layers, records)
    transport = VirtualTransport(timing.bandwidth, timing.latency) if timing else VirtualTransport()
    loader = Loader(cache, Sizes(trace.header), transport, setting.depth, setting.cooperative)
    for steps in trace.sequences():
        if clear:
            loader.flush()
        loader.start_sequence()
        for step in steps:
            asked = wanted(step.ids, step.weights, setting.thresholds)
            if timing:
                transport.compute(timing.layer)
            for _ in loader.serve(step.layer, asked, expected_of(step, setting)):
                if timing:
                    transport.compute(timing.expert)
    return Replayed(loader.counts, trace.header.ratio, transport.now, transport.waited)


def _check_depth(trace: Trace, depth: int) -> None:
    recorded = max((len(step.ahead) for step in trace.steps), default=0)
    if depth > recorded and trace.header.n_layers > 1:
        raise ValueError(f"prefetch depth {depth}: the trace was recorded with predictions {recorded} layers ahead")


def expected_of(step: Step, setting: Setting) -> list[Expected]:
    """What a step predicted of the layers after it."""
    return [
        (step.layer + 1 + i, wanted(ids, weights, setting.thresholds))
        for i, (ids, weights) in enumerate(step.ahead[: setting.depth])
    ]


def budget(header: Header, memory: int, low_share: float) -> dict[Precision, int]:
    """Bytes of each pool, of which `low_share` are for LOW copies.

    Raises: ValueError where a share is none or a pool cannot hold its largest expert.
    """
    if not 0 <= low_share < 1:
        raise ValueError(f"share of memory for LOW copies {low_share}, allowed: 0 <= share < 1")
    low = int(memory * low_share)
    largest = max(max(layer, default=0) for layer in header.high)
    if memory - low < largest:
        raise ValueError(f"{memory - low:,} bytes for HIGH copies do not hold one expert of {largest:,} bytes")
    return {Precision.HIGH: memory - low, Precision.LOW: low}

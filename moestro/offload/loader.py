"""Serving the experts of one layer after another: what is cached, what is brought, what is fetched ahead.

One definition for generation, where a transport copies bytes, and for replays, where a clock stands in for it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from moestro.offload.cache import COPIES, SlotCache
from moestro.offload.counts import Counts
from moestro.offload.policies import Key
from moestro.offload.scorer import Precision
from moestro.offload.transport import AHEAD, DEMAND, Job, Ticket, Transport

Copy = tuple[Key, Precision]
# What a layer further on is expected to ask: its number, and expert -> precision.
Expected = tuple[int, Mapping[int, Precision]]


class Slots(Protocol):
    """The bytes behind the bookkeeping. `take` gives a copy fast memory and says how it is filled; `scratch` is a slot
    of its own for when all others are pinned."""

    def size(self, key: Key, precision: Precision) -> int: ...

    def take(self, key: Key, precision: Precision, scratch: bool = False) -> Job: ...

    def release(self, key: Key, precision: Precision) -> None: ...


@dataclass(frozen=True)
class Served:
    """An expert that may be computed now, from a copy of this precision; `in_place`: where it lies in slow memory."""

    expert: int
    precision: Precision
    in_place: bool = False
    scratch: bool = False


class Loader:
    """Brings experts through a cache (Tang 2024, arXiv:2411.01433, 3.2-3.4).

    `depth` layers ahead are looked at: the first with an expert that is not there has it fetched; expected experts are
    pinned, and fetches that a layer turns out not to want are given up at the end of a block. `cooperative`: a miss is
    computed where it lies, and its copy comes along behind.
    """

    def __init__(
        self, cache: SlotCache, slots: Slots, transport: Transport, depth: int = 0, cooperative: bool = False
    ) -> None:
        if depth < 0:
            raise ValueError(f"prefetch depth {depth}, allowed: 0 (none) or more")
        self.cache, self.slots, self.transport = cache, slots, transport
        self.depth, self.cooperative = depth, cooperative
        self.counts = Counts()
        self._coming: dict[Copy, Ticket] = {}
        self._unused: dict[Copy, int] = {}
        self._expected: dict[int, set[Key]] = {}
        self._layer = -1

    def start_sequence(self) -> None:
        """Records begin anew; cached weights stay."""
        self.cache.records.start_sequence()
        self._layer = -1

    def serve(
        self,
        layer: int,
        wanted: Mapping[int, Precision],
        expected: Sequence[Expected] | Callable[[], Sequence[Expected]] = (),
    ) -> Iterator[Served]:
        """The experts of a layer in ascending order, each when it can be computed; skipped ones are left out. A copy
        may be overwritten once the next one is asked for.

        `expected` (or what it returns, asked for once this layer's own copies are on their way) are the next layers'.
        """
        self._enter(layer)
        self._give_up(layer, wanted)
        plan = {expert: self._plan((layer, expert), asked) for expert, asked in wanted.items()}
        served = {e: precision for e, precision in plan.items() if precision is not Precision.SKIP}
        self.cache.pinned |= {(layer, e) for e, p in served.items() if ((layer, e), p) in self.cache}
        absent = [e for e, precision in served.items() if ((layer, e), precision) not in self.cache]
        in_place = set(absent) if self.cooperative else set()
        absent = self._bring(layer, served, absent)
        if not absent:
            self._look_ahead(layer, expected() if callable(expected) else expected)
        try:
            for expert, precision in served.items():
                yield self._serve(layer, expert, precision, expert in in_place)
                self.cache.pinned.discard((layer, expert))
                absent = self._bring(layer, served, [e for e in absent if e > expert])
        finally:
            self.cache.pinned -= {(layer, expert) for expert in served}

    def _enter(self, layer: int) -> None:
        if layer <= self._layer or self._layer < 0:
            self.cache.records.start_pass()
            self.counts.passes += 1
        self._layer = layer

    def _give_up(self, layer: int, wanted: Mapping[int, Precision]) -> None:
        """Unpin what was expected of this layer, and stop fetching of it what is not wanted."""
        self.cache.pinned -= self._expected.pop(layer, set())
        for (key, precision), ticket in list(self._coming.items()):
            asked = wanted.get(key[1], Precision.SKIP)
            useful = asked is not Precision.SKIP and self.cache.serving(key, asked) is precision
            if ticket.error is not None or (key[0] == layer and not useful and not self.transport.arrived(ticket)):
                self._drop((key, precision), ticket)
            elif self.transport.arrived(ticket):
                del self._coming[key, precision]

    def _drop(self, copy: Copy, ticket: Ticket) -> None:
        self.transport.cancel(ticket)
        del self._coming[copy]
        self.counts.wasted += self._unused.pop(copy, 0)
        self.counts.cancelled += 1
        self.cache.discard(*copy)
        self.slots.release(*copy)

    def _plan(self, key: Key, asked: Precision) -> Precision:
        """Count a request and record the use; the precision of the copy that will serve it, SKIP for none."""
        counts, found = self.counts, self.cache.serving(key, asked)
        counts.requests += 1
        counts.asked_high += asked is Precision.HIGH
        counts.asked_low += asked is Precision.LOW
        counts.asked_skip += asked is Precision.SKIP
        served = asked if found is None else found
        if found is None:
            counts.misses_high += asked is Precision.HIGH
            counts.misses_low += asked is Precision.LOW
            counts.skips += asked is Precision.SKIP
        else:
            counts.hits_high += found is Precision.HIGH
            counts.hits_low += found is Precision.LOW
            counts.ahead += self._unused.pop((key, found), None) is not None
        if served is not Precision.SKIP:
            self.cache.records.use(key, asked)
        return served

    def _bring(self, layer: int, served: Mapping[int, Precision], absent: Sequence[int]) -> list[int]:
        """Ask for the experts that are not there, as far as there is room; those left over."""
        left = list(absent)
        while left and self._fetch((layer, left[0]), served[left[0]], layer, AHEAD if self.cooperative else DEMAND):
            self.cache.pinned.add((layer, left.pop(0)))
        return left

    def _fetch(self, key: Key, precision: Precision, layer: int, urgency: int) -> bool:
        size = self.slots.size(key, precision)
        evicted = self.cache.admit(key, precision, size, layer)
        if evicted is None:
            return False
        for victim in evicted:
            self._forget((victim, precision))
        self._coming[key, precision] = self.transport.submit(self.slots.take(key, precision), urgency)
        if urgency == AHEAD:
            self.counts.fetched_ahead += size
        else:
            self.counts.demanded += size
        return True

    def _forget(self, copy: Copy) -> None:
        """An evicted copy: a fetch of it that still runs is given up first."""
        ticket = self._coming.pop(copy, None)
        if ticket is not None:
            self.transport.cancel(ticket)
        self.counts.wasted += self._unused.pop(copy, 0)
        self.slots.release(*copy)

    def _look_ahead(self, layer: int, expected: Sequence[Expected]) -> None:
        """Pin what is expected, and fetch what the first layer lacks that lacks something."""
        lacking = False
        for ahead, experts in expected[: self.depth]:
            asked = {(ahead, e): p for e, p in experts.items() if p is not Precision.SKIP}
            missing = [key for key, precision in asked.items() if self.cache.serving(key, precision) is None]
            self.cache.pinned -= self._expected.pop(ahead, set())
            self._expected[ahead] = asked.keys() - set(missing)
            self.cache.pinned |= self._expected[ahead]
            if missing and not lacking:
                lacking = True
                self._fetch_ahead(ahead, {key: asked[key] for key in missing}, layer)

    def _fetch_ahead(self, ahead: int, missing: Mapping[Key, Precision], layer: int) -> None:
        for key, precision in missing.items():
            if not self._fetch(key, precision, layer, AHEAD):
                self.counts.refused += 1
                continue
            self._unused[key, precision] = self.slots.size(key, precision)
            self.cache.pinned.add(key)
            self._expected[ahead].add(key)

    def _serve(self, layer: int, expert: int, precision: Precision, in_place: bool) -> Served:
        key = (layer, expert)
        ticket = self._coming.get((key, precision))
        if in_place:
            self.counts.in_place += 1
            return Served(expert, precision, in_place=True)
        if (key, precision) not in self.cache:
            self.counts.scratch += 1
            self.counts.demanded += self.slots.size(key, precision)
            ticket = self.transport.submit(self.slots.take(key, precision, scratch=True), DEMAND)
            try:
                self.transport.wait(ticket)
            finally:
                # blocks of a copy that failed may still run, and the next one is to lie here
                self.transport.cancel(ticket)
            return Served(expert, precision, scratch=True)
        if ticket is not None:
            self.counts.late += ticket.urgency == AHEAD and not self.transport.arrived(ticket)
            self._arrive((key, precision), ticket)
        return Served(expert, precision)

    def _arrive(self, copy: Copy, ticket: Ticket) -> None:
        self.transport.promote(ticket)
        try:
            self.transport.wait(ticket)
        except BaseException:
            # what is half there must never be taken for a copy
            self._drop(copy, ticket)
            raise
        del self._coming[copy]

    def flush(self) -> None:
        """Give up every fetch and forget every copy."""
        for copy, ticket in list(self._coming.items()):
            self._drop(copy, ticket)
        for precision in COPIES:
            for key in list(self.cache.pools[precision].held):
                self.slots.release(key, precision)
        self.cache.clear()
        self.cache.pinned.clear()
        self._expected.clear()
        self._unused.clear()

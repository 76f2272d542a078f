"""How copies come into fast memory: a queue, demand before what is fetched ahead, block by block; here on a clock of
its own, for replays and tests without timing noise."""

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from moestro.offload.policies import Key
from moestro.offload.scorer import Precision

DEMAND, AHEAD = 0, 1


@dataclass
class Job:
    """One copy to bring: `blocks` do the work in pieces, one after another, or several at once where they are not
    `ordered`; a transport of a clock only counts `size` bytes."""

    key: Key
    precision: Precision
    size: int
    blocks: Sequence[Callable[[], object]] = ()
    ordered: bool = True


@dataclass(eq=False)
class Ticket:
    """The state of a job in a transport; of its blocks so many have begun, are `running`, and have `moved` (bytes,
    where a clock counts them)."""

    job: Job
    urgency: int
    order: int = 0
    done: bool = False
    cancelled: bool = False
    begun: int = 0
    running: int = 0
    moved: int = 0
    ready_at: float = 0.0
    error: BaseException | None = None

    def __lt__(self, other: "Ticket") -> bool:
        return (self.urgency, self.order) < (other.urgency, other.order)


class Transport(Protocol):
    """Brings copies, in the order asked for, demand first; a job can be given up between two blocks."""

    def submit(self, job: Job, urgency: int) -> Ticket: ...

    def promote(self, ticket: Ticket) -> None: ...

    def cancel(self, ticket: Ticket) -> None: ...

    def arrived(self, ticket: Ticket) -> bool: ...

    def wait(self, ticket: Ticket) -> None: ...

    def close(self) -> None: ...


@dataclass
class VirtualTransport:
    """A channel of `bandwidth` bytes/s and `latency` s a job, on a virtual clock (seconds).

    Bytes move while `compute` lets time pass and while `wait` waits. A running job gives way to a more urgent one, and
    stops when cancelled, at the end of its block. Without a bandwidth copies arrive at once.
    """

    bandwidth: float | None = None
    latency: float = 0.0
    block: int = 1 << 22
    now: float = 0.0
    waited: float = 0.0
    moved: int = 0
    _free_at: float = 0.0
    _queue: list[Ticket] = field(default_factory=list)
    _orders: itertools.count = field(default_factory=itertools.count)

    def submit(self, job: Job, urgency: int) -> Ticket:
        self._run(self.now)
        ticket = Ticket(job, urgency, next(self._orders))
        # an idle channel starts now, not in the past
        self._free_at = max(self._free_at, self.now)
        heapq.heappush(self._queue, ticket)
        self._run(self.now)
        return ticket

    def promote(self, ticket: Ticket) -> None:
        ticket.urgency = DEMAND
        heapq.heapify(self._queue)

    def cancel(self, ticket: Ticket) -> None:
        self._run(self.now)
        ticket.cancelled = not ticket.done
        self._queue = [other for other in self._queue if not other.cancelled]
        heapq.heapify(self._queue)

    def arrived(self, ticket: Ticket) -> bool:
        self._run(self.now)
        return ticket.done and ticket.ready_at <= self.now

    def wait(self, ticket: Ticket) -> None:
        self._run(self.now)
        while not ticket.done:
            self._block()
        self.waited += max(0.0, ticket.ready_at - self.now)
        self.now = max(self.now, ticket.ready_at)

    def compute(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds
        self._run(self.now)

    def close(self) -> None:
        self._queue.clear()

    def _run(self, until: float) -> None:
        """Every block that has begun before `until`."""
        while self._queue and (self.bandwidth is None or self._free_at < until):
            self._block()

    def _block(self) -> None:
        ticket, left = self._queue[0], self._queue[0].job.size - self._queue[0].moved
        size = left if self.bandwidth is None else min(self.block, left)
        if self.bandwidth is not None:
            self._free_at += size / self.bandwidth + (self.latency if ticket.moved == 0 else 0.0)
        ticket.moved += size
        self.moved += size
        if ticket.moved >= ticket.job.size:
            heapq.heappop(self._queue)
            ticket.done, ticket.ready_at = True, self._free_at

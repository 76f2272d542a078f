"""The transport that copies: threads that work a queue block by block, demand first."""

import heapq
import itertools
from threading import Condition, Thread

from moestro.offload.files import OffloadError
from moestro.offload.transport import DEMAND, Job, Ticket


class ThreadTransport:
    """Jobs run their blocks in threads; between two blocks a more urgent job goes first and a cancelled one ends.

    An error in a block is raised by `wait`. `close` ends the threads; what still waits is cancelled.
    """

    def __init__(self, workers: int = 2) -> None:
        if workers < 1:
            raise ValueError(f"workers={workers}, allowed: at least 1")
        self.moved = 0
        self._queue: list[Ticket] = []
        self._running: set[Ticket] = set()
        self._orders, self._changed, self._closed = itertools.count(), Condition(), False
        self._threads = [Thread(target=self._work, name=f"offload-{i}", daemon=True) for i in range(workers)]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job, urgency: int) -> Ticket:
        """Queue a job.

        Raises: OffloadError where the transport is closed.
        """
        with self._changed:
            if self._closed:
                raise OffloadError("the transport is closed")
            ticket = Ticket(job, urgency, next(self._orders))
            heapq.heappush(self._queue, ticket)
            self._changed.notify_all()
        return ticket

    def promote(self, ticket: Ticket) -> None:
        with self._changed:
            ticket.urgency = DEMAND
            heapq.heapify(self._queue)

    def cancel(self, ticket: Ticket) -> None:
        """Give a job up; returns once none of its blocks runs, so that its memory may be used again."""
        with self._changed:
            ticket.cancelled = not ticket.done
            self._queue = [other for other in self._queue if other is not ticket]
            heapq.heapify(self._queue)
            self._changed.wait_for(lambda: ticket not in self._running)

    def arrived(self, ticket: Ticket) -> bool:
        return ticket.done and ticket.error is None

    def wait(self, ticket: Ticket) -> None:
        """Raises: what a block of the job raised; OffloadError where it was given up or the transport closed."""
        with self._changed:
            self._changed.wait_for(lambda: ticket.done or ticket.cancelled)
        if ticket.error is not None:
            raise ticket.error
        if ticket.cancelled:
            raise OffloadError(f"the copy of expert {ticket.job.key} was given up")

    def close(self) -> None:
        with self._changed:
            self._closed = True
            for ticket in self._queue:
                ticket.cancelled = True
            self._queue.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (ticket := self._next()) is not None:
            self._step(ticket)

    def _next(self) -> Ticket | None:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed)
            if self._closed:
                return None
            ticket = heapq.heappop(self._queue)
            self._running.add(ticket)
            return ticket

    def _step(self, ticket: Ticket) -> None:
        """One block; the job goes back into the queue while there are more."""
        blocks, error = ticket.job.blocks, None
        try:
            if blocks:
                blocks[ticket.moved]()
        except Exception as raised:
            error = raised
        with self._changed:
            self._running.discard(ticket)
            ticket.moved += 1
            ticket.error = error
            ticket.done = error is not None or ticket.moved >= len(blocks)
            if not ticket.done and not ticket.cancelled and not self._closed:
                heapq.heappush(self._queue, ticket)
            elif not ticket.done:
                ticket.cancelled = True
            if ticket.done and error is None:
                self.moved += ticket.job.size
            self._changed.notify_all()

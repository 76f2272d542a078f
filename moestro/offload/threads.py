"""The transport that copies: threads that work a queue block by block, demand first."""

import heapq
import itertools
from threading import Condition, Thread

from moestro.offload.files import OffloadError
from moestro.offload.transport import DEMAND, Job, Ticket


class ThreadTransport:
    """Jobs run their blocks in threads, all threads those of one job where these need no order; between two blocks a
    more urgent job goes first and a cancelled one ends.

    An error in a block is raised by `wait`. `close` ends the threads; what still waits is cancelled.
    """

    def __init__(self, workers: int = 2) -> None:
        if workers < 1:
            raise ValueError(f"workers={workers}, allowed: at least 1")
        self.moved = 0
        # tickets with blocks that may begin now
        self._queue: list[Ticket] = []
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
            self._withdraw(ticket)
            self._changed.wait_for(lambda: not ticket.running)

    def _withdraw(self, ticket: Ticket) -> None:
        self._queue = [other for other in self._queue if other is not ticket]
        heapq.heapify(self._queue)

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
        while (begun := self._next()) is not None:
            self._step(*begun)

    def _next(self) -> tuple[Ticket, int] | None:
        """A ticket and the number of its block that begins."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed)
            if self._closed:
                return None
            ticket = self._queue[0]
            ticket.begun += 1
            ticket.running += 1
            if ticket.job.ordered or ticket.begun >= len(ticket.job.blocks):
                heapq.heappop(self._queue)
            return ticket, ticket.begun - 1

    def _step(self, ticket: Ticket, block: int) -> None:
        """One block; an ordered job goes back into the queue while there are more."""
        blocks, error = ticket.job.blocks, None
        try:
            if blocks:
                blocks[block]()
        except Exception as raised:
            error = raised
        with self._changed:
            self._ended(ticket, error)
            self._changed.notify_all()

    def _ended(self, ticket: Ticket, error: Exception | None) -> None:
        ticket.running -= 1
        ticket.moved += 1
        ticket.error = ticket.error or error
        whole = ticket.moved >= len(ticket.job.blocks)
        ticket.done = whole or ticket.error is not None
        if ticket.error is not None:
            self._withdraw(ticket)
        elif whole:
            self.moved += ticket.job.size
        elif ticket.cancelled or self._closed:
            ticket.cancelled = True
        elif ticket.job.ordered:
            heapq.heappush(self._queue, ticket)

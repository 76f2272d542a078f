"""The one thread that runs the model: a bounded queue, and turns of one token each."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from moestro.generation import Continuation, Piece
from moestro.serve.errors import ApiError, Busy, Closing

LOG = logging.getLogger(__name__)

Event = Piece | ApiError


class Job:
    """A continuation and who hears of its pieces; `emit` is called in the worker's thread and must not block."""

    def __init__(self, continuation: Continuation, emit: Callable[[Event], None]) -> None:
        self.continuation, self.emit = continuation, emit
        self.cancelled = False


class Worker:
    """Runs up to `active` continuations in turns, a token each, and keeps up to `waiting` more in order of arrival.

    Every continuation has its own cache and is alone in its batch: its text is the one it has without company, which
    batches of changing size do not give (products of other shapes round otherwise), and a short answer does not wait
    for a long one.
    """

    def __init__(self, active: int, waiting: int) -> None:
        self._most_active, self.places = active, active + waiting
        self._active: deque[Job] = deque()
        self._waiting: deque[Job] = deque()
        self._stepping: Job | None = None
        self._changed = threading.Condition()
        self._deadline: float | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="generation", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def close(self) -> None:
        """End what is left, and the thread."""
        self.drain(0.0)
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def drain(self, seconds: float) -> None:
        """Take no more jobs; those it has may go on for so many seconds, then they end with `Closing`."""
        with self._changed:
            self._deadline = time.monotonic() + seconds
            self._changed.notify()

    @property
    def closing(self) -> bool:
        """Whether no more jobs are taken."""
        return self._deadline is not None

    @property
    def n_active(self) -> int:
        """Continuations that take turns."""
        return len(self._active) + (self._stepping is not None)

    @property
    def n_waiting(self) -> int:
        """Continuations that have not begun."""
        return len(self._waiting)

    def admit(self, jobs: Sequence[Job], retry_after: int = 1) -> None:
        """Take all of these jobs, or none.

        Raises: Busy where there are too few places; Closing.
        """
        with self._changed:
            if self._deadline is not None:
                raise Closing
            if self.n_active + self.n_waiting + len(jobs) > self.places:
                raise Busy(self.places, retry_after)
            self._waiting.extend(jobs)
            self._changed.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Take no more turns for these jobs; those that wait give their places up at once."""
        for job in jobs:
            job.cancelled = True
        with self._changed:
            self._waiting = deque(job for job in self._waiting if not job.cancelled)

    def _run(self) -> None:
        while (job := self._next()) is not None:
            going_on = not job.cancelled and self._step(job)
            with self._changed:
                self._stepping = None
                if going_on:
                    self._active.append(job)

    def _next(self) -> Job | None:
        """The job whose turn it is; None at the end."""
        with self._changed:
            while True:
                if self._deadline is not None and time.monotonic() >= self._deadline:
                    self._end_all()
                while self._waiting and len(self._active) < self._most_active:
                    self._active.append(self._waiting.popleft())
                if self._active:
                    self._stepping = self._active.popleft()
                    return self._stepping
                if self._closed:
                    return None
                self._changed.wait()

    def _end_all(self) -> None:
        for job in (*self._active, *self._waiting):
            job.emit(Closing())
        self._active.clear()
        self._waiting.clear()

    @staticmethod
    def _step(job: Job) -> bool:
        """Whether the job goes on after one more token."""
        try:
            piece = job.continuation.step()
        except Exception:  # whatever a model raises ends this job, not the server
            LOG.exception("a continuation failed")
            job.emit(ApiError(500, "the model failed on this request; the server's log says why", code="model_failed"))
            return False
        job.emit(piece)
        return piece.reason is None

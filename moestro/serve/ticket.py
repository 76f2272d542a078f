"""One request's continuations, from the worker's thread to the event loop."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from functools import partial

from moestro.generation import Continuation, Piece
from moestro.serve.errors import ApiError
from moestro.serve.metrics import Metrics
from moestro.serve.worker import Event, Job, Worker


class Ticket:
    """Admits the continuations of a request and hears of their pieces, in the order in which they come.

    Raises: Busy, Closing.
    """

    def __init__(self, worker: Worker, metrics: Metrics, continuations: Sequence[Continuation]) -> None:
        self._worker, self._metrics, self._continuations = worker, metrics, continuations
        self._loop, self._events = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Event]]()
        self._begun, self._ended = time.perf_counter(), False
        self._jobs = [Job(each, partial(self._emit, index)) for index, each in enumerate(continuations)]
        worker.admit(self._jobs, metrics.retry_after())
        metrics.prompt_tokens += sum(each.n_prompt for each in continuations)

    @property
    def n_choices(self) -> int:
        """How many texts are written."""
        return len(self._jobs)

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """(choice, its next piece) until all have ended.

        Raises: ApiError where one failed or was ended.
        """
        open_choices, first = self.n_choices, True
        while open_choices:
            index, event = await self._events.get()
            if isinstance(event, ApiError):
                self._ended = True
                raise event
            if first:
                self._metrics.first_token.observe(time.perf_counter() - self._begun)
                first = False
            self._metrics.generated_tokens += 1
            open_choices -= event.reason is not None
            self._ended = not open_choices
            yield index, event
        self._metrics.whole_answer.observe(time.perf_counter() - self._begun)

    def leave(self) -> None:
        """Nobody waits for the answer any more: what is not written yet never is."""
        if not self._ended:
            self._metrics.disconnects += 1
            self._ended = True
        self._worker.cancel(self._jobs)

    def usage(self) -> dict[str, int]:
        """Tokens of the prompts, and those generated, with the ones that ended texts."""
        prompt = sum(each.n_prompt for each in self._continuations)
        generated = sum(len(each.new_tokens) for each in self._continuations)
        return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}

    def _emit(self, index: int, event: Event) -> None:
        # a second Ctrl-C ends the loop before the worker
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

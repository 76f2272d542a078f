"""Checkpoints of several ranks, written while training goes on."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as settled
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from moestro.parallel.ranks import Ranks, is_silence
from moestro.train.checkpoint import publishing, unfinished


class BackgroundWriter:
    """Every rank copies what it holds to the CPU's memory, which training waits for, and writes the copy in a thread.
    The checkpoint appears, complete, when all ranks have written. One is written at a time: the next one waits.

    `wait` raises what went wrong; nothing of an unfinished checkpoint is ever read. Entered, it is left when what is
    being written is there, whatever error ends training, but for ranks that are lost: they would be waited for again.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.pending: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self.pending is not None and isinstance(error, Exception) and not is_silence(error):
            settled([self.pending])

    def write(
        self, path: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any], then: Callable[[], None]
    ) -> None:
        """Write `tensors` and `state` as the checkpoint `path`, call `then` on the main rank. All ranks call it."""
        from moestro.parallel.storage import Held

        self.wait()
        held = {file: {name: Held.copied(tensor) for name, tensor in named.items()} for file, named in tensors.items()}
        self.pending = self.thread.submit(self._write, path, held, state, then)

    def wait(self) -> None:
        """Until the last checkpoint is complete.

        Raises: CheckpointError where it could not be written.
        """
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def _write(self, path: Path, held: Mapping[str, Any], state: dict[str, Any], then: Callable[[], None]) -> None:
        from moestro.parallel.storage import save_pieces

        if not self.ranks.main:
            save_pieces(unfinished(path), held, self.ranks.rank, self.ranks.files)
            return
        with publishing(path, state) as (folder, hashes):
            hashes |= save_pieces(folder, held, self.ranks.rank, self.ranks.files)
        then()

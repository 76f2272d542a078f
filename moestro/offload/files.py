"""Reading parts of files that must not change underneath."""

import os
from collections.abc import Sequence
from pathlib import Path
from threading import Lock

from torch import Tensor

from moestro.offload.blobs import Extent


class OffloadError(RuntimeError):
    """Something outside this process took away what it needs: a file changed, a disk is full, memory does not do."""


class Files:
    """Opens every file once and reads from it at any place, from several threads.

    A file that is deleted stays readable; one that is cut or written to raises OffloadError that names it, so that
    nothing is computed from other bytes than those the model was opened with.
    """

    def __init__(self) -> None:
        self._opened: dict[Path, tuple[int, tuple[int, int]]] = {}
        self._lock = Lock()

    def _descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._opened:
                try:
                    descriptor = os.open(path, os.O_RDONLY)
                except OSError as error:
                    raise OffloadError(f"{path} cannot be opened: {error.strerror}") from error
                self._opened[path] = descriptor, _state(descriptor)
            descriptor, state = self._opened[path]
        if _state(descriptor) != state:
            raise OffloadError(f"{path} changed while the model was running (size or time of change)")
        return descriptor

    def open(self, path: Path) -> None:
        """Open a file now: from here on it may be deleted.

        Raises: OffloadError where that is not possible.
        """
        self._descriptor(path)

    def read(self, extent: Extent, into: Tensor) -> None:
        """Fill bytes (uint8, on the CPU) from a file.

        Raises: OffloadError where the file ended, changed, or cannot be read.
        """
        view = into.numpy().data
        self._fill(extent.file, self._descriptor(extent.file), extent.start, view[: extent.size])

    def read_rows(self, path: Path, start: int, rows: Sequence[int], into: Tensor) -> None:
        """Fill `into` [n, bytes of a row] (uint8, on the CPU) with rows of a table that begins at byte `start`; rows
        that follow one another are read at once.

        Raises: as `read`.
        """
        descriptor, view, size = self._descriptor(path), into.numpy().data.cast("B"), into.shape[1]
        place = 0
        while place < len(rows):
            end = place + 1
            while end < len(rows) and rows[end] == rows[end - 1] + 1:
                end += 1
            self._fill(path, descriptor, start + rows[place] * size, view[place * size : end * size])
            place = end

    def _fill(self, path: Path, descriptor: int, start: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            try:
                read = os.preadv(descriptor, [view[done:]], start + done)
            except OSError as error:
                raise OffloadError(f"{path} cannot be read: {error.strerror}") from error
            if read == 0:
                raise OffloadError(f"{path} ends at byte {start + done}: it was cut while running")
            done += read

    def close(self) -> None:
        """Close all."""
        with self._lock:
            for descriptor, _ in self._opened.values():
                os.close(descriptor)
            self._opened.clear()


def _state(descriptor: int) -> tuple[int, int]:
    found = os.fstat(descriptor)
    return found.st_size, found.st_mtime_ns

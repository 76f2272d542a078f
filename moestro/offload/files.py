"""Reading parts of files that must not change underneath."""

import errno
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock, local

import numpy as np
from torch import Tensor

from moestro.offload.blobs import Extent

# What direct reads begin at and are multiples of: no disk has larger sectors.
SECTOR = 4096
# Bytes that a direct read asks for at most: a block of 4 MiB that begins inside of a sector.
PIECE = (4 << 20) + SECTOR


class OffloadError(RuntimeError):
    """Something outside this process took away what it needs: a file changed, a disk is full, memory does not do."""


@dataclass(frozen=True)
class Opened:
    """An open file as it was then; `direct`: it is read past the system's page cache."""

    path: Path
    descriptor: int
    direct: bool
    state: tuple[int, int]


class Files:
    """Opens every file once and reads from it at any place, from several threads.

    A file that is deleted stays readable; one that is cut or written to raises OffloadError that names it, so that
    nothing is computed from other bytes than those the model was opened with.

    `direct`: past the system's page cache, where a file's system can. What is read then lies in memory once, and no
    time goes into pages that make room for one another.
    """

    def __init__(self, direct: bool = False) -> None:
        self.direct = direct and hasattr(os, "O_DIRECT")
        self._opened: dict[Path, Opened] = {}
        self._lock, self._own = Lock(), local()

    def _file(self, path: Path) -> Opened:
        with self._lock:
            if path not in self._opened:
                try:
                    self._opened[path] = _open(path, self.direct)
                except OSError as error:
                    raise OffloadError(f"{path} cannot be opened: {error.strerror}") from error
            opened = self._opened[path]
        if _state(opened.descriptor) != opened.state:
            raise OffloadError(f"{path} changed while the model was running (size or time of change)")
        return opened

    def open(self, path: Path) -> None:
        """Open a file now: from here on it may be deleted.

        Raises: OffloadError where that is not possible.
        """
        self._file(path)

    def read(self, extent: Extent, into: Tensor) -> None:
        """Fill bytes (uint8, on the CPU) from a file.

        Raises: OffloadError where the file ended, changed, or cannot be read.
        """
        self._fill(self._file(extent.file), extent.start, into.numpy()[: extent.size])

    def read_rows(self, path: Path, start: int, rows: Sequence[int], into: Tensor) -> None:
        """Fill `into` [n, bytes of a row] (uint8, on the CPU) with rows of a table that begins at byte `start`; rows
        that follow one another are read at once.

        Raises: as `read`.
        """
        opened, view, size = self._file(path), into.view(-1).numpy(), into.shape[1]
        place = 0
        while place < len(rows):
            end = place + 1
            while end < len(rows) and rows[end] == rows[end - 1] + 1:
                end += 1
            self._fill(opened, start + rows[place] * size, view[place * size : end * size])
            place = end

    def _fill(self, opened: Opened, start: int, view: np.ndarray) -> None:
        read, done = self._read_direct if opened.direct else _read, 0
        while done < len(view):
            try:
                more = read(opened.descriptor, view[done:], start + done)
            except OSError as error:
                raise OffloadError(f"{opened.path} cannot be read: {error.strerror}") from error
            if more <= 0:
                raise OffloadError(f"{opened.path} ends at byte {start + done}: it was cut while running")
            done += more

    def _read_direct(self, descriptor: int, view: np.ndarray, start: int) -> int:
        """As `_read`, through whole sectors in memory of this thread that begins at a page."""
        if not hasattr(self._own, "sectors"):
            self._own.sectors = np.frombuffer(mmap.mmap(-1, PIECE), np.uint8)
        sectors, skip = self._own.sectors, start % SECTOR
        asked = min(len(sectors), -(-(skip + len(view)) // SECTOR) * SECTOR)
        found = min(os.preadv(descriptor, [sectors[:asked].data], start - skip) - skip, len(view))
        view[: max(0, found)] = sectors[skip : skip + found]
        return found

    def close(self) -> None:
        """Close all."""
        with self._lock:
            for opened in self._opened.values():
                os.close(opened.descriptor)
            self._opened.clear()


def _open(path: Path, direct: bool) -> Opened:
    if direct:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
            return Opened(path, descriptor, True, _state(descriptor))
        except OSError as error:
            # EINVAL: a file system without direct reads
            if error.errno != errno.EINVAL:
                raise
    descriptor = os.open(path, os.O_RDONLY)
    return Opened(path, descriptor, False, _state(descriptor))


def _read(descriptor: int, view: np.ndarray, start: int) -> int:
    return os.preadv(descriptor, [view.data], start)


def _state(descriptor: int) -> tuple[int, int]:
    found = os.fstat(descriptor)
    return found.st_size, found.st_mtime_ns

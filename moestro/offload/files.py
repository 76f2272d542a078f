"""Reading parts of files that must not change underneath."""

import os
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
        descriptor, view, done = self._descriptor(extent.file), into.numpy().data, 0
        while done < extent.size:
            try:
                read = os.preadv(descriptor, [view[done : extent.size]], extent.start + done)
            except OSError as error:
                raise OffloadError(f"{extent.file} cannot be read: {error.strerror}") from error
            if read == 0:
                raise OffloadError(f"{extent.file} ends at byte {extent.start + done}: it was cut while running")
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

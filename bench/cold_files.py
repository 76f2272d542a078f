"""Files that no page of memory holds: what reads them next has them from the disk, and is charged for their pages."""

import ctypes
import mmap
import os
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from moestro.offload.blobs import Extent
from moestro.offload.files import Files

BLOCK = 4 << 20


def make_cold(paths: Iterable[Path]) -> None:
    """Write what waits to be written and drop every page of these files from memory.

    Raises: RuntimeError where pages stay, e.g. as another process has them mapped.
    """
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            held = held_pages(descriptor)
        finally:
            os.close(descriptor)
        if held:
            raise RuntimeError(f"{path}: {held} pages stay in memory; does another process use it?")


def held_pages(descriptor: int) -> int:
    """Pages of a file that lie in memory (`mincore`)."""
    size = os.fstat(descriptor).st_size
    if not size:
        return 0
    found = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    # a private mapping, which ctypes may take the address of
    with mmap.mmap(descriptor, size, mmap.MAP_PRIVATE) as mapped:
        place = ctypes.c_char.from_buffer(mapped)
        failed = ctypes.CDLL(None, use_errno=True).mincore(
            ctypes.c_void_p(ctypes.addressof(place)), ctypes.c_size_t(size), found
        )
        del place
    if failed:
        raise OSError(ctypes.get_errno(), "mincore")
    return sum(byte & 1 for byte in found)


def disk_speed(path: Path, direct: bool, blocks: int = 64) -> float:
    """Bytes a second of a cold file, read in order by one thread."""
    make_cold([path])
    files, into = Files(direct), torch.empty(BLOCK, dtype=torch.uint8)
    files.open(path)
    count = min(blocks, path.stat().st_size // BLOCK)
    start = time.perf_counter()
    for block in range(count):
        files.read(Extent(path, block * BLOCK, BLOCK, 0), into)
    took = time.perf_counter() - start
    files.close()
    return count * BLOCK / took

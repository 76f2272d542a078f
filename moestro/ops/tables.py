"""Where large tables lie: in memory, in huge pages where there are such, or in files that are mapped into it."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch
from torch import Tensor

from moestro.ops.huge_pages import request_huge_pages

_FOLDER: ContextVar[Path | None] = ContextVar("folder of mapped tables", default=None)


@contextmanager
def tables_in(folder: Path | None) -> Iterator[None]:
    """Inside, `new_table` maps tables on the CPU from files in `folder`; with None they are in memory.

    A table may then be larger than memory: the system writes rows to the disk that have not been used for long, and
    reads them again when they are. The files have no name: they go with the process, however it ends, and are not what
    training continues from (that is the checkpoint).
    """
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    token = _FOLDER.set(folder)
    try:
        yield
    finally:
        _FOLDER.reset(token)


def new_table(
    rows: int, width: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Tensor:
    """Zeros [rows, width] for a table of rows, in huge pages where the system has them.

    Raises: OSError where a file of that size does not fit on the disk.
    """
    dtype, device = dtype or torch.get_default_dtype(), torch.device(device or torch.get_default_device())
    folder = _FOLDER.get()
    if folder is not None and device.type == "cpu" and rows * width:
        return _mapped(rows, width, dtype, folder)
    table = torch.empty(rows, width, dtype=dtype, device=device)
    # first asked for, then written: pages are made when they are
    request_huge_pages(table)
    return table.zero_()


def _mapped(rows: int, width: int, dtype: torch.dtype, folder: Path) -> Tensor:
    with tempfile.NamedTemporaryFile(dir=folder, prefix="table-") as file:
        size = rows * width * dtype.itemsize
        if hasattr(os, "posix_fallocate"):
            # a disk that is full must say so now, not kill the process when a page is first written
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)
        return torch.from_file(file.name, shared=True, size=rows * width, dtype=dtype).view(rows, width)

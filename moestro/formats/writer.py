"""Safetensors files written a piece at a time: out of tensors, out of other files, or as it is computed."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moestro.formats.shards import DTYPES, Entry

NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Bytes that are read, copied to the CPU, hashed and written at a time.
PIECE = 2**24


@dataclass(frozen=True)
class Outgoing:
    """One tensor of a file to be written: `dtype` by the format's name; `pieces()` are its `nbytes` bytes in order,
    which nobody makes before they are written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    pieces: Callable[[], Iterable[bytes | memoryview]]

    @property
    def n_elements(self) -> int:
        """Numbers of the tensor."""
        return math.prod(self.shape)

    @property
    def element_size(self) -> float:
        """Bytes of one number; 0 where there is none."""
        return self.nbytes / max(1, self.n_elements)


def of_tensor(name: str, tensor: Tensor) -> Outgoing:
    """A tensor in memory, wherever it lies.

    Raises: ValueError for a dtype that the format does not name.
    """
    if tensor.dtype not in NAMES:
        raise ValueError(f"{name}: {tensor.dtype} cannot be stored; allowed: {', '.join(map(str, NAMES))}")
    return Outgoing(name, NAMES[tensor.dtype], tuple(tensor.shape), tensor.nbytes, lambda: tensor_pieces(tensor))


def of_file(name: str, folder: Path, entry: Entry, rows: Iterable[int] | None = None) -> Outgoing:
    """A tensor of another file under the name `name`, byte for byte; or these rows of its first dimension."""
    if rows is None:
        size = entry.stop - entry.start
        return Outgoing(
            name, entry.dtype, entry.shape, size, lambda: file_pieces(folder / entry.file, entry.start, entry.stop)
        )
    chosen = tuple(rows)
    each = (entry.stop - entry.start) // max(1, entry.shape[0])
    runs = [(entry.start + first * each, entry.start + last * each) for first, last in _runs(chosen)]

    def pieces() -> Iterator[bytes]:
        return chain.from_iterable(file_pieces(folder / entry.file, start, stop) for start, stop in runs)

    return Outgoing(name, entry.dtype, (len(chosen), *entry.shape[1:]), each * len(chosen), pieces)


def computed(name: str, dtype: torch.dtype, shape: tuple[int, ...], compute: Callable[[], Tensor]) -> Outgoing:
    """A tensor that exists only while it is written.

    Raises, when it is written: ValueError where it is not of this dtype and shape.
    """

    def pieces() -> Iterator[memoryview]:
        tensor = compute()
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} {shape}")
        return tensor_pieces(tensor)

    return Outgoing(name, NAMES[dtype], shape, math.prod(shape) * dtype.itemsize, pieces)


def write_file(
    path: Path, tensors: Iterable[Outgoing], metadata: Mapping[str, str] | None = None, sparse: bool = False
) -> str:
    """Write one safetensors file; returns its SHA-256 (hexadecimal).

    `sparse` leaves holes for pieces of zeros. Not for files that are written again and again as they fill up, such as
    checkpoints with moments of 0: a disk too small should refuse the first one, not one hours later.

    Raises: ValueError where a tensor has other bytes than it said; OSError where the system refuses.
    """
    # widest first: every tensor then begins at a multiple of its dtype's size
    order = sorted(tensors, key=lambda tensor: -tensor.element_size)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for piece in chain([header(order, metadata)], *(_checked(tensor) for tensor in order)):
            digest.update(piece)
            if sparse and _is_zero(piece):
                # a hole, where the file system has them
                file.seek(len(piece), os.SEEK_CUR)
            else:
                file.write(piece)
        file.truncate()
    return digest.hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write `tensors`, wherever they lie, into one safetensors file; returns its SHA-256 (hexadecimal). No second copy
    of them is ever in memory.

    Raises: ValueError for a dtype that the format does not name; OSError where the system refuses.
    """
    return write_file(path, [of_tensor(name, tensors[name]) for name in sorted(tensors)])


def header(tensors: Iterable[Outgoing], metadata: Mapping[str, str] | None = None) -> bytes:
    """Length and JSON of dtype, shape and place of every tensor, in the order in which they follow."""
    entries: dict[str, dict] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for tensor in tensors:
        stop = start + tensor.nbytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def tensor_pieces(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor, `PIECE` of them at a time."""
    flat = tensor.detach().reshape(-1)
    size = PIECE // tensor.element_size()
    for start in range(0, len(flat), size):
        part = flat[start : start + size].cpu().contiguous()
        yield part.view(torch.uint8).numpy().data


def file_pieces(path: Path, start: int, stop: int) -> Iterator[bytes]:
    """Bytes start:stop of a file, `PIECE` of them at a time.

    Raises: ValueError where the file ends before.
    """
    with path.open("rb") as file:
        while start < stop:
            piece = os.pread(file.fileno(), min(PIECE, stop - start), start)
            if not piece:
                raise ValueError(f"{path} ends at byte {start}, expected at least {stop}: it changed while it was read")
            start += len(piece)
            yield piece


def _is_zero(piece: bytes | memoryview) -> bool:
    """Whether a piece has no other bytes; looks no further than the first one."""
    return not any(piece[:64]) and not np.frombuffer(piece, np.uint8).any()


def _checked(tensor: Outgoing) -> Iterator[bytes | memoryview]:
    written = 0
    for piece in tensor.pieces():
        written += len(piece)
        yield piece
    if written != tensor.nbytes:
        raise ValueError(f"{tensor.name} has {written} bytes, its header says {tensor.nbytes}")


def _runs(rows: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Rows as ranges of consecutive ones."""
    first = 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or rows[i] != rows[i - 1] + 1:
            yield rows[first], rows[i - 1] + 1
            first = i

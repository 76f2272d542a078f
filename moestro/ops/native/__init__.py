"""The optional compiled kernels: whether they are there, and how to run one on tensors.

A plain C library without headers of PyTorch or Python, so that no version of either can break it; loaded with ctypes,
tensors passed as pointers. Its kernels exist once for each kind of processor in `build.VARIANTS`; the fastest that this
one can run is chosen when the library is loaded. Everything works without it (`ops.backend`).
"""

import ctypes
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

HOW_TO_BUILD = "python -m moestro.ops.native.build"
# Parts of a job for every thread: those that finish early take more of them.
PARTS = 8


@dataclass(frozen=True)
class Library:
    """The loaded library and the variant of its kernels in use; without one (`handle` None), why."""

    handle: ctypes.CDLL | None
    variant: str = ""
    reason: str = ""


_forced: Library | None = None


def library() -> Library:
    """The library in use."""
    return _forced or _load()


@torch.compiler.assume_constant_result
def available() -> bool:
    """Whether there is one. Compiled graphs ask while they are made: looking for a library cannot be traced."""
    return library().handle is not None


def status() -> str:
    """The variant of the kernels in use, or `not in use` and why."""
    found = library()
    return found.variant if found.handle else f"not in use: {found.reason}"


def variants() -> list[str]:
    """The variants of the kernels that this processor can run, from slowest to fastest."""
    handle = _load().handle
    if handle is None:
        return []
    return [name for name in handle.moestro_variants().decode().split() if handle.moestro_supports(name.encode())]


@contextmanager
def variant(name: str) -> Iterator[None]:
    """Run the body with one variant of the kernels.

    Raises: ValueError for one that this processor cannot run.
    """
    if name not in variants():
        raise ValueError(f"variant={name!r} of the native kernels, allowed: {', '.join(variants()) or 'none'}")
    with using(replace(_load(), variant=name)):
        yield


@contextmanager
def using(library: Library) -> Iterator[None]:
    """Run the body with the kernels of another library."""
    global _forced
    before, _forced = _forced, library
    try:
        yield
    finally:
        _forced = before


def even_parts(items: int) -> list[int]:
    """Bounds of equal parts of a job of that many items, enough of them for the threads that torch may use."""
    threads = torch.get_num_threads()
    parts = max(1, min(items, PARTS * threads if threads > 1 else 1))
    return [items * i // parts for i in range(parts + 1)]


def run(kernel: str, bounds: Sequence[int], *fields: Tensor | int | float | bytes) -> None:
    """Run a kernel on the items `bounds[0]:bounds[1]`, `bounds[1]:bounds[2]`, ... on as many threads as torch may use.

    `fields` fill the kernel's struct in its order: a contiguous tensor on the CPU as pointer, an int as int64, a float
    as double, bytes as they are (`struct_of`). What they point to is the caller's to check: C does not.

    Raises: RuntimeError where there is no library; ValueError for a tensor that has no plain memory.
    """
    found = library()
    if found.handle is None:
        raise RuntimeError(f"native kernels are {status()}")
    ends = (ctypes.c_int64 * len(bounds))(*bounds)
    function = ctypes.cast(getattr(found.handle, f"{kernel}_{found.variant}"), ctypes.c_void_p)
    found.handle.moestro_run(function, struct_of(kernel, *fields), ends, len(bounds) - 1, torch.get_num_threads())


def struct_of(kernel: str, *fields: Tensor | int | float | bytes) -> bytes:
    """The struct of a kernel, for kernels that are run several times with the same: whoever keeps it keeps the tensors.

    Raises: ValueError for a tensor that has no plain memory.
    """
    return b"".join(field if isinstance(field, bytes) else _packed(kernel, field) for field in fields)


def _packed(kernel: str, field: Tensor | int | float) -> bytes:
    if isinstance(field, Tensor):
        if field.device.type != "cpu" or not field.is_contiguous():
            raise ValueError(f"{kernel}: a tensor on {field.device} with strides {field.stride()}, allowed: contiguous")
        return struct.pack("P", field.data_ptr())
    return struct.pack("d" if isinstance(field, float) else "q", field)


@lru_cache(maxsize=1)
def _load() -> Library:
    # imported here so that running it as a module does not find it imported already
    from moestro.ops.native.build import LIBRARY, fingerprint

    if not LIBRARY.exists():
        return Library(None, reason=f"not built ({HOW_TO_BUILD})")
    try:
        handle = opened(LIBRARY)
        current = handle.moestro_fingerprint().decode() == fingerprint()
    except (OSError, AttributeError) as error:
        return Library(None, reason=f"{LIBRARY.name} cannot be loaded: {error} ({HOW_TO_BUILD})")
    if not current:
        return Library(None, reason=f"built from other sources ({HOW_TO_BUILD})")
    names = handle.moestro_variants().decode().split()
    return Library(handle, [name for name in names if handle.moestro_supports(name.encode())][-1])


def opened(library: Path) -> ctypes.CDLL:
    """A library of kernels, its functions declared.

    Raises: OSError where it cannot be loaded, AttributeError where it is none of ours.
    """
    handle = ctypes.CDLL(str(library))
    handle.moestro_fingerprint.restype = handle.moestro_variants.restype = ctypes.c_char_p
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    handle.moestro_run.argtypes = [pointer, ctypes.c_char_p, ctypes.POINTER(number), number, number]
    handle.moestro_run.restype = None
    return handle

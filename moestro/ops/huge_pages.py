"""Huge pages for large tables on the CPU: random rows then miss the address cache far less often."""

import ctypes
import platform
from pathlib import Path

from torch import Tensor

_SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_SIZE_FILE = _SWITCH.with_name("hpage_pmd_size")
# asm-generic/mman-common.h
_MADV_HUGEPAGE = 14
# bytes: no system has smaller huge pages, and small tensors should not cost a look at its settings
_SMALLEST = 2**20


def huge_pages() -> str:
    """Whether memory can lie in transparent huge pages here: Linux's own `always`, `madvise` (where asked for, as
    `request_huge_pages` does) or `never`; `unavailable` where the system knows none."""
    if platform.system() != "Linux" or not (_SWITCH.exists() and _SIZE_FILE.exists()):
        return "unavailable"
    return _SWITCH.read_text().split("[")[1].split("]")[0]


def request_huge_pages(tensor: Tensor) -> bool:
    """Ask the system to keep the whole huge pages inside a tensor's memory as such; True where it agreed.

    To be called before the memory is first written: pages are made then. Where there are no huge pages, where the
    system refuses, where the tensor is not on the CPU or smaller than one, nothing happens; values never change.
    """
    if tensor.device.type != "cpu" or tensor.nbytes < _SMALLEST or huge_pages() not in ("always", "madvise"):
        return False
    size = int(_SIZE_FILE.read_text())
    first = -(-tensor.data_ptr() // size) * size
    length = (tensor.data_ptr() + tensor.nbytes) // size * size - first
    if length <= 0:
        return False
    return ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), _MADV_HUGEPAGE) == 0

"""How the process keeps its memory."""

import ctypes
import platform

# glibc's mallopt parameters (malloc.h). No threshold above 32 MiB is accepted for what gets a mapping of its own, and
# gradients of experts are larger: nothing gets one.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_SETTINGS = {_MMAP_MAX: 0, _TRIM_THRESHOLD: (1 << 31) - 1, _TOP_PAD: 64 << 20}


def keep_freed_memory() -> bool:
    """Tell the C library to keep up to 2 GiB of freed memory for the next step instead of handing it back.

    A training step on the CPU allocates and frees the same tensors again and again; by default glibc returns the larger
    ones to the system every time, and the system clears the pages anew. True where the C library took the settings,
    False where it is not glibc: nothing depends on it but time.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return all(libc.mallopt(parameter, value) == 1 for parameter, value in _SETTINGS.items())

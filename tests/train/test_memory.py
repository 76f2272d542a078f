"""Freed memory is kept: repeated allocations of a step's size touch no new pages."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from moestro.train.memory import keep_freed_memory
kept = keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def work():
    # 8 MiB, and more than any threshold of the C library's
    torch.ones(1 << 21), torch.ones(1 << 24)
for _ in range(3):
    work()
before = faults()
for _ in range(20):
    work()
print(kept, faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_used_again_without_new_pages():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    kept, faults = done.stdout.split()
    assert kept == "True"
    # 8 MiB handed back and cleared anew would be 2048 pages, 20 times
    assert int(faults) < 2048

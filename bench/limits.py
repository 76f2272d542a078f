"""Running a command under a hard limit of memory: a control group of its own where one can be made, else rlimit."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CGROUPS = Path("/sys/fs/cgroup")


@contextmanager
def memory_limit(size: int) -> Iterator[dict[str, str]]:
    """How a child enters a limit of `size` bytes, as environment variables for `enter`: a control group, removed
    afterwards, or a limit of the process's own data.

    A group is charged for pages of files as well, but only for those that its own processes bring into memory: files
    that must count have to be cold (`bench.cold_files`). The other limit does not know of them.
    """
    group = _group(size)
    if group is None:
        yield {"BENCH_RLIMIT": str(size)}
        return
    try:
        yield {"BENCH_CGROUP": str(group)}
    finally:
        group.rmdir()


def _group(size: int) -> Path | None:
    """A child of this process's control group with a limit; None where there is none to be had."""
    for line in Path("/proc/self/cgroup").read_text().splitlines() if Path("/proc/self/cgroup").exists() else []:
        _, controllers, path = line.split(":", 2)
        first, limit = ("memory", "memory.limit_in_bytes") if controllers == "memory" else (".", "memory.max")
        if controllers not in ("memory", ""):
            continue
        group = CGROUPS / first / path.lstrip("/") / f"moestro-bench-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / limit).write_text(str(size))
            # nor may it swap out what is beyond the limit; only where there are accounts of swap
            if (swap := group / "memory.swap.max").exists():
                swap.write_text("0")
            return group
        except OSError:
            group.rmdir()
    return None


def enter() -> str:
    """Put this process under the limit that its environment names; says which kind it is."""
    if group := os.environ.get("BENCH_CGROUP"):
        (Path(group) / "cgroup.procs").write_text(str(os.getpid()))
        return "cgroup"
    if size := os.environ.get("BENCH_RLIMIT"):
        resource.setrlimit(resource.RLIMIT_DATA, (int(size), int(size)))
        return "rlimit"
    return "none"


def read_from_disk() -> int:
    """Bytes that this process has had from disks so far, however it reads; 0 where the system does not say."""
    path = Path("/proc/self/io")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), 0)


def limited(command: Sequence[str], size: int, python: str = sys.executable, **variables: str) -> dict[str, Any]:
    """Run a command under the limit, with these variables in its environment; the JSON object that is its last line of
    output.

    Raises: RuntimeError with the end of what it said where it failed.
    """
    with memory_limit(size) as entering:
        environment = {**os.environ, **entering, **variables, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run([python, *command], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:3])} ended with {done.returncode}: {done.stderr[-600:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])

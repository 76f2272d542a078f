"""How much memory a machine has, and how much of it is left to this process."""

import os
import re
import resource
from collections.abc import Iterator
from pathlib import Path

# Where Linux says how much memory a container may use (cgroup v2, v1).
CONTROL_GROUPS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
MEMORY_INFO, OWN_GROUP, GROUPS = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
OWN_SIZE = Path("/proc/self/statm")
# How cgroup v2 and v1 say so: the line that names this process's group, where groups lie, the files of the limit and of
# what is used, and what of that is pages of files.
VERSIONS = (
    (r"^0::/(.*)$", "", "memory.max", "memory.current", "inactive_file"),
    (r"^\d+:memory:/(.*)$", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def machine_memory() -> int | None:
    """Bytes of the machine's memory, or what the control group allows; None where it is not known."""
    if "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    limits = [_limit(path) for path in CONTROL_GROUPS]
    return min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *(limit for limit in limits if limit)])


def free_machine_memory() -> int | None:
    """Bytes that this process may still take: what the machine can give without swapping, or what is left to a control
    group of this process or by its limit of addresses (`ulimit -v`), whichever is less; None where it is not known."""
    found = re.search(r"^MemAvailable: *(\d+) kB$", _text(MEMORY_INFO), re.MULTILINE)
    if found is None:
        return None
    return max(0, min([1024 * int(found[1]), *_left_to_groups(), *_left_of_addresses()]))


def _left_to_groups() -> Iterator[int]:
    """What each limit leaves that holds for this process: its own control group's and those above it."""
    for line, root, most, usage, unused in VERSIONS:
        group, top = re.search(line, _text(OWN_GROUP), re.MULTILINE), GROUPS / root
        own = top / group[1] if group else top
        for folder in (own, *own.parents):
            limit, used = _limit(folder / most), _limit(folder / usage)
            if limit is not None and used is not None:
                # pages of files are given back when memory is asked for
                cached = re.search(rf"^{unused} (\d+)$", _text(folder / "memory.stat"), re.MULTILINE)
                yield limit - used + (int(cached[1]) if cached else 0)
            if folder == top:
                break


def _left_of_addresses() -> Iterator[int]:
    """What the limit of addresses leaves, where there is one."""
    limit, pages = resource.getrlimit(resource.RLIMIT_AS)[0], _text(OWN_SIZE).split()
    if limit != resource.RLIM_INFINITY and pages:
        yield limit - int(pages[0]) * resource.getpagesize()


def _text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def _limit(path: Path) -> int | None:
    text = path.read_text().strip() if path.is_file() else "max"
    return int(text) if text.isdecimal() else None

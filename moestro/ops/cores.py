"""How many of the machine's cores this process has."""

import os


def own_cores() -> int:
    """Cores that this process may run on: fewer than the machine has where a job or a container is bound to some."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

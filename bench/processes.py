"""Ranks of a benchmark as forked processes of this machine."""

import multiprocessing
from collections.abc import Callable
from typing import Any


def run_ranks(name: str, world: int, target: Callable[..., None], *arguments: Any) -> None:
    """`target(rank, *arguments)` in `world` processes at once, until all have ended.

    Raises: RuntimeError where one failed.
    """
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=target, args=(rank, *arguments)) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    if any(process.exitcode for process in ranks):
        raise RuntimeError(f"{name}: a rank failed")

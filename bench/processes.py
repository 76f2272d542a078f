"""Processes of a benchmark on this machine: ranks, and one that keeps its memory to itself."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch


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


def in_its_own_process(seed: int, measure: Callable[..., Any], *arguments: Any) -> Any:
    """`measure(*arguments)` by a new interpreter, with this seed and as many threads as here; its memory goes when it
    ends. Where it exits or raises, so does this."""
    begin = seed, torch.get_num_threads()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=_begin, initargs=begin) as process:
        return process.submit(measure, *arguments).result()


def _begin(seed: int, threads: int) -> None:
    torch.manual_seed(seed)
    torch.set_num_threads(threads)

"""Real processes of one group, for tests: forked, so that nothing is imported again."""

import multiprocessing
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


def in_ranks(n: int, work: Callable[[int], object], folder: Path, seconds: float = 60) -> None:
    """Call `work(rank)` in `n` processes of a gloo group; fails with the tracebacks of those that failed."""
    folder.mkdir(parents=True, exist_ok=True)
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=_rank, args=(rank, n, work, folder, seconds)) for rank in range(n)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=2 * seconds)
        process.kill()
    texts = [file.read_text() for file in sorted(folder.glob("failed-*"))]
    assert not texts, "\n".join(texts)
    assert [process.exitcode for process in ranks] == [0] * n


def _rank(rank: int, n: int, work: Callable[[int], object], folder: Path, seconds: float) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meeting'}",
        rank=rank,
        world_size=n,
        timeout=timedelta(seconds=seconds),
    )
    try:
        work(rank)
        dist.destroy_process_group()
    except BaseException:
        (folder / f"failed-{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        raise

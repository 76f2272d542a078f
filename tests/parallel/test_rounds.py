"""Ranks that are started anew beside the store of those before them."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moestro.parallel.ranks import RankLost, Ranks, joined
from moestro.parallel.rounds import LATEST, own_round
from moestro.parallel.settings import ParallelSettings

SHORT, ENOUGH = timedelta(seconds=0.2), timedelta(seconds=20)


@pytest.fixture
def store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def meet(store: dist.TCPStore, world: int, late: int) -> list[dist.Store]:
    """Each rank's part of the store; one rank comes later than the others."""

    def come(rank: int) -> dist.Store:
        time.sleep(0.3 * (rank == late))
        client = dist.TCPStore("127.0.0.1", store.port, is_master=False)
        return own_round(client, rank, world, ENOUGH)

    with ThreadPoolExecutor(world) as threads:
        return list(threads.map(come, range(world)))


@pytest.mark.parametrize("late", [0, 1, 2])
def test_ranks_share_a_part_that_those_before_did_not_see(store: dist.TCPStore, late: int) -> None:
    for world in (3, 3, 4):
        parts = meet(store, world, late)
        assert not any(part.check([str(rank)]) for part in parts for rank in range(4))
        for rank, part in enumerate(parts):
            part.set(str(rank), "here")
        assert all(part.check([str(rank)]) for part in parts for rank in range(world))


def test_a_round_that_was_given_up_is_not_joined(store: dist.TCPStore) -> None:
    """Rank 0 ended before all had come, after rank 1 had answered it."""
    with pytest.raises(RuntimeError):
        own_round(store, 0, 3, SHORT)
    with pytest.raises(RuntimeError, match=r"did not meet within 0.2 s"):
        own_round(store, 1, 3, SHORT)
    given_up = store.get(LATEST)
    meet(store, 3, late=0)
    assert store.get(LATEST) != given_up


def test_who_waits_for_the_main_rank_is_told_when_it_fails(store: dist.TCPStore) -> None:
    def ranks(rank: int) -> Ranks:
        return Ranks(torch.device("cpu"), rank, 2, store=dist.TCPStore("127.0.0.1", store.port, is_master=False))

    def fails() -> bool:
        time.sleep(0.2)
        return ranks(0).first_to_fail()

    with ThreadPoolExecutor(1) as thread:
        main, waits = thread.submit(fails), ranks(1)
        with pytest.raises(RankLost, match="rank 1 of 2 waited for data"), waits.main_first("data"):
            pass
        # whoever has the cause says it
        assert main.result() and not waits.first_to_fail()


def life(rank: int, port: int, results: Path, killed: bool) -> None:
    """A rank from start to end under torchrun, whose agent keeps the store; rank 1 may end without a word, rank 0 comes
    late."""
    torch.set_num_threads(1)
    time.sleep(1.0 * (rank == 0))
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    with joined("cpu", ParallelSettings(timeout_s=10)) as ranks:
        found = ranks.store.check(["data"])
        total = int(ranks.summed(torch.tensor(rank + 1)))
        with ranks.main_first("data"):
            (results / str(rank)).write_text(json.dumps([found, total]))
        first = ranks.first_to_fail()
        assert [ranks.any(first), ranks.any(not first)] == [True, True], "one of two is the first"
        if killed and rank == 1:
            os._exit(9)


def test_a_group_is_formed_anew_beside_the_keys_of_the_one_before(store: dist.TCPStore, tmp_path: Path) -> None:
    """Without rounds, rank 1 looks for rank 0 where it listened before and is refused; it finds the data done, and no
    rank is the first to fail."""
    fork = get_context("fork")
    for number, ends in enumerate(([0, 9], [0, 0])):
        results = tmp_path / str(number)
        results.mkdir()
        ranks = [fork.Process(target=life, args=(rank, store.port, results, not number)) for rank in range(2)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(30)
            process.kill()
        assert [process.exitcode for process in ranks] == ends
        assert [json.loads((results / str(rank)).read_text()) for rank in range(2)] == [[False, 3]] * 2

"""A step on several ranks is that of one process: loss, objectives, figures, every gradient and their norm."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from moestro.parallel.parallelize import parallelize
from moestro.parallel.ranks import Ranks, joined
from moestro.parallel.settings import ParallelSettings
from tests.parallel.models import PER_MICRO_BATCH, SYSTEMS, dynmoe, hmoe, one_step
from tests.parallel.processes import in_ranks
from tests.tolerances import FLOAT32

FULL = ParallelSettings(timeout_s=60)


def compare(rank: int, systems: list[str], settings: ParallelSettings, parts: int = 1, **more: object) -> None:
    """With one process that takes its batch in so many micro-batches."""
    with joined("cpu", settings) as ranks:
        for system in systems:
            own = one_step(system, ranks, settings, **more)  # type: ignore[arg-type]
            alone = one_step(system, Ranks.alone(), settings, **{"accumulate": parts} | more)  # type: ignore[arg-type]
            assert own.keys() == alone.keys()
            for name, value in alone.items():
                difference = float((own[name].double() - value.double()).abs().max())
                assert torch.allclose(own[name].double(), value.double(), **FLOAT32), f"{system} {name}: {difference}"


def test_all_systems_fully_sharded(tmp_path: Path) -> None:
    in_ranks(2, partial(compare, systems=list(SYSTEMS), settings=FULL), tmp_path)


def test_a_generator_in_several_blocks_is_held_once(tmp_path: Path) -> None:
    in_ranks(2, partial(compare, systems=list(PER_MICRO_BATCH), settings=FULL, parts=2), tmp_path)


@pytest.mark.parametrize("more", [{"accumulate": 2}, {"recompute": True}], ids=str)
def test_accumulation_and_recomputation(tmp_path: Path, more: dict) -> None:
    in_ranks(2, partial(compare, systems=["hmoe", "dynmoe"], settings=FULL, **more), tmp_path)


def test_every_rank_whole(tmp_path: Path) -> None:
    in_ranks(2, partial(compare, systems=["hmoe", "peer"], settings=ParallelSettings("none", timeout_s=60)), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("sharding, replicas", [("full", 1), ("hybrid", 2)])
def test_four_ranks(tmp_path: Path, sharding: str, replicas: int) -> None:
    settings = ParallelSettings(sharding, replicas, reshard=False, timeout_s=60)  # type: ignore[arg-type]
    in_ranks(4, partial(compare, systems=list(SYSTEMS), settings=settings), tmp_path)
    in_ranks(4, partial(compare, systems=list(SYSTEMS), settings=settings, accumulate=2), tmp_path / "again")


def spread(rank: int) -> None:
    with joined("cpu", FULL) as ranks:
        for system in (hmoe, dynmoe):
            model, _ = system()
            parallelize(model, ranks, FULL)
            for name, parameter in model.named_parameters():
                assert isinstance(parameter, DTensor) is (parameter.ndim > 0), name
                if parameter.ndim > 0:
                    assert parameter.to_local().numel() < parameter.numel() or parameter.shape[0] == 1, name


def test_parameters_are_shards(tmp_path: Path) -> None:
    in_ranks(2, spread, tmp_path)

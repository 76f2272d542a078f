"""The processes that train one model together: who they are, how they are grouped, and how one joins them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from moestro.parallel.settings import ParallelSettings

FAILED = "moestro/failed"
COPIES, EXPERTS, SHARDS = "copies", "experts", "shards"


class RankLost(RuntimeError):
    """Another rank ended, or could not be reached in time."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that train one model; alone, there are no groups.

    `shards` is the mesh of FSDP: (shards), or (copies, shards) where there are copies. `experts` is the mesh of expert
    parallelism, (copies, experts): the ranks along `experts` hold all experts together, those along `copies` the same
    ones. `files` is a group of its own on the CPU, for what is written while training goes on.
    """

    device: torch.device
    rank: int = 0
    world: int = 1
    shards: DeviceMesh | None = None
    experts: DeviceMesh | None = None
    files: Any = None

    @classmethod
    def alone(cls, device: str | torch.device = "cpu") -> "Ranks":
        """A single process."""
        return cls(torch.device(device))

    @classmethod
    def grouped(cls, device: torch.device, settings: ParallelSettings) -> "Ranks":
        """This process in the initialised process group; every rank must call it.

        Raises: ValueError where the settings do not fit the number of ranks.
        """
        world, copies, timeout = dist.get_world_size(), settings.copies(dist.get_world_size()), waiting_time(settings)
        if world == 1:
            return cls.alone(device)
        return cls(
            device,
            dist.get_rank(),
            world,
            grid(device, copies, world // copies, SHARDS, timeout),
            grid(device, world // settings.experts, settings.experts, EXPERTS, timeout),
            dist.new_group(backend="gloo", timeout=timeout),
        )

    @property
    def main(self) -> bool:
        """Whether this is the rank that writes metrics and talks to the user."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        """Whether there are other ranks."""
        return self.world > 1

    def own_rows(self, n: int) -> slice:
        """This rank's share of `n` rows, in order of ranks; shares differ by at most one."""
        return slice(self.rank * n // self.world, (self.rank + 1) * n // self.world)

    @torch.no_grad()
    def summed(self, own: Tensor) -> Tensor:
        """The sum of all ranks' tensors, the same on each; every rank must call it."""
        if not self.several:
            return own
        total = own.clone()
        dist.all_reduce(total)
        return total

    def told(self, value: Any) -> Any:
        """The main rank's value, on every rank; every rank must call it."""
        if not self.several:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.files)
        return box[0]

    def first_to_fail(self) -> bool:
        """Whether no other rank has called this: of several failing ranks the first has the cause, and says it."""
        if not self.several:
            return True
        try:
            return dist.distributed_c10d._get_default_store().add(FAILED, 1) == 1
        except (RuntimeError, ValueError):  # nobody left to ask
            return True


def waiting_time(settings: ParallelSettings) -> timedelta:
    """How long one rank waits for another."""
    return timedelta(seconds=settings.timeout_s)


def grid(device: torch.device, rows: int, columns: int, inner: str, timeout: timedelta) -> DeviceMesh:
    """All ranks as `rows` times `columns`, the latter neighbours; one row is a mesh of one dimension. Groups are made
    here because those of `init_device_mesh` wait for half an hour, whatever the process group does."""
    ranks = torch.arange(rows * columns).view(rows, columns)
    if rows == 1 and inner == SHARDS:
        return DeviceMesh.from_group(dist.group.WORLD, device.type, mesh_dim_names=(inner,))  # type: ignore[arg-type]
    groups = [dist.new_subgroups_by_enumeration(members.tolist(), timeout=timeout)[0] for members in (ranks.T, ranks)]
    return DeviceMesh.from_group(groups, device.type, mesh=ranks, mesh_dim_names=(COPIES, inner))


def launched() -> bool:
    """Whether torchrun, or something that sets the same variables, started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def own_device(device: str | torch.device) -> torch.device:
    """The device of this process: of several CUDA devices of a host, that of its number on the host."""
    device = torch.device(device)
    if device.type != "cuda" or device.index is not None or not launched():
        return device
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


@contextmanager
def joined(device: str | torch.device, settings: ParallelSettings) -> Iterator[Ranks]:
    """The ranks that torchrun started, or those of a process group that is there already, or this process alone. The
    groups that were made are gone afterwards.

    Raises: ValueError where the settings do not fit the number of ranks; RankLost where others do not come in time.
    """
    device = own_device(device)
    if dist.is_available() and dist.is_initialized():
        yield Ranks.grouped(device, settings)
        return
    if not launched() or os.environ["WORLD_SIZE"] == "1":
        yield Ranks.alone(device)
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=waiting_time(settings))
    except dist.DistError as error:
        raise RankLost(f"cannot join the other ranks: {error}") from error
    try:
        yield Ranks.grouped(device, settings)
    finally:
        dist.destroy_process_group()

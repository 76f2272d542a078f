"""The processes that train one model together: who they are, how they are grouped, and how one joins them."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from threading import Thread
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.rendezvous import rendezvous

from moestro.parallel.rounds import own_round
from moestro.parallel.settings import ParallelSettings
from moestro.parallel.sums import summed_over_ranks

FAILED = "moestro/failed"
# Seconds in which a store that can be reached answers; its client waits without end where the network is cut.
ANSWER_S = 5.0
# How long a rank waits before it looks whether another one has failed.
A_WHILE = timedelta(seconds=1)
# what gloo and NCCL say where another rank is gone or silent
SILENCE = re.compile(r"gloo|nccl|connection (closed|reset|refused)|timed? ?out|broken pipe|socket", re.IGNORECASE)
# The largest seed of a step: torch takes none above 2^64.
PRIME = 2**61 - 1
COPIES, EXPERTS, SHARDS = "copies", "experts", "shards"


class RankLost(RuntimeError):
    """Another rank ended, could not be reached, or was silent for too long."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that train one model; alone, there are no groups.

    `shards` is the mesh of FSDP: (shards), or (copies, shards) where there are copies. `experts` is the mesh of expert
    parallelism, (copies, experts): the ranks along `experts` hold all experts together, those along `copies` the same
    ones. `control` is a group on the CPU for what ranks tell each other, `files` another one, for what is written while
    training goes on; `store` answers each rank without the others.
    """

    device: torch.device
    rank: int = 0
    world: int = 1
    shards: DeviceMesh | None = None
    experts: DeviceMesh | None = None
    control: Any = None
    files: Any = None
    store: Any = None

    @classmethod
    def alone(cls, device: str | torch.device = "cpu") -> "Ranks":
        """A single process."""
        return cls(torch.device(device))

    @classmethod
    def grouped(cls, device: torch.device, settings: ParallelSettings, store: Any = None) -> "Ranks":
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
            dist.new_group(backend="gloo", timeout=timeout),
            store,
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

    def summed(self, own: Tensor) -> Tensor:
        """The sum of all ranks' tensors, the same on each; every rank must call it."""
        return summed_over_ranks(own) if self.several else own

    def told(self, value: Any) -> Any:
        """The main rank's value, on every rank; every rank must call it."""
        if not self.several:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def any(self, own: bool) -> bool:
        """Whether it is so on any rank; every rank must call it. No device is waited for."""
        if not self.several:
            return own
        flag = torch.tensor([int(own)])
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.control)
        return bool(flag)

    def least(self, own: float) -> float:
        """The smallest of all ranks' numbers; every rank must call it. No device is waited for."""
        if not self.several:
            return own
        number = torch.tensor(own, dtype=torch.float64)
        dist.all_reduce(number, dist.ReduceOp.MIN, group=self.control)
        return float(number)

    def seed_step(self, seed: int, step: int) -> None:
        """Make torch's default generators a function of (seed, step, rank), so that what is drawn in a step differs
        among ranks, and training continues alike after an interruption. Alone, one sequence of draws goes on from step
        to step, and is kept in checkpoints."""
        if self.several:
            torch.manual_seed(((seed * 1_000_003 + step) * 65_537 + self.rank) % PRIME)

    @contextmanager
    def main_first(self, what: str) -> Iterator[None]:
        """Let the main rank do something before the others, however long it takes: they find what it left in files.

        Raises: RankLost on those that wait, where a rank fails meanwhile.
        """
        if self.store is not None and not self.main:
            self._await(what)
        yield
        if self.store is not None and self.main:
            self.store.set(what, "done")

    def _await(self, what: str) -> None:
        while not self.store.check([what]):
            if self.store.check([FAILED]):
                raise RankLost(f"rank {self.rank} of {self.world} waited for {what}, and another rank failed meanwhile")
            with suppress(dist.DistStoreError):
                self.store.wait([what], A_WHILE)

    def first_to_fail(self) -> bool:
        """Whether no other rank has called this: of several failing ranks the first has the cause, and says it. Where
        the store does not answer, this rank is cut off, and says so."""
        count: list[int] = []
        if self.store is None:
            return True
        asking = Thread(target=lambda: count.append(self.store.add(FAILED, 1)), daemon=True)
        asking.start()
        asking.join(ANSWER_S)
        return not count or count[0] == 1


def waiting_time(settings: ParallelSettings) -> timedelta:
    """How long one rank waits for another."""
    return timedelta(seconds=settings.timeout_s)


def grid(device: torch.device, rows: int, columns: int, inner: str, timeout: timedelta) -> DeviceMesh:
    """All ranks as `rows` times `columns`, the latter neighbours; one row is a mesh of one dimension. Groups are made
    here because those of `init_device_mesh` wait for half an hour, whatever the process group does."""
    ranks = torch.arange(rows * columns).view(rows, columns)
    if rows == 1 and inner == SHARDS:
        return DeviceMesh.from_group(dist.group.WORLD, device.type, mesh_dim_names=(inner,))  # type: ignore[arg-type]
    groups: list[Any] = [
        dist.new_subgroups_by_enumeration(members.tolist(), timeout=timeout)[0] for members in (ranks.T, ranks)
    ]
    return DeviceMesh.from_group(groups, device.type, mesh=ranks, mesh_dim_names=(COPIES, inner))


def launched() -> bool:
    """Whether torchrun, or something that sets the same variables, started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def speaks() -> bool:
    """Whether this process is the one that talks to the user: the main rank, or the only one."""
    return os.environ.get("RANK", "0") == "0"


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

    Where ranks fail, the first one raises its error; the others, who only notice, exit with code 1 and no message.

    Raises: ValueError where the settings do not fit the number of ranks; RankLost where another rank ends, or is not
    heard of for `timeout_s`.
    """
    device = own_device(device)
    if dist.is_available() and dist.is_initialized():
        yield Ranks.grouped(device, settings)
    elif not launched() or os.environ["WORLD_SIZE"] == "1":
        yield Ranks.alone(device)
    else:
        with Meeting(device, settings) as meeting:
            yield Ranks.grouped(device, settings, meeting.store)


class Meeting:
    """The process group that the environment describes, while entered; an error that leaves it is told once."""

    def __init__(self, device: torch.device, settings: ParallelSettings) -> None:
        self.device, self.settings = device, settings

    def __enter__(self) -> Self:
        self.store = meet(self.device, self.settings)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        first = error is None or Ranks(self.device, store=self.store).first_to_fail()
        dist.destroy_process_group()
        if not isinstance(error, Exception) or getattr(error, "of_all_ranks", False):
            return
        if not first:
            raise SystemExit(1) from error
        if is_silence(error):
            raise lost(error, self.settings) from error


def meet(device: torch.device, settings: ParallelSettings) -> Any:
    """Initialise the process group that the environment describes; returns its store, of which these
    ranks see what they wrote themselves, nothing of those before a restart.

    Raises: RankLost where others do not come in time.
    """
    timeout = waiting_time(settings)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        store, rank, world = next(iter(rendezvous("env://", timeout=timeout)))
        store.set_timeout(timeout)
        store = own_round(store, rank, world, timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        raise lost(error, settings) from error
    return store


def is_silence(error: Exception) -> bool:
    """Whether an error says that another rank was not heard of."""
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and bool(SILENCE.search(str(error))))


def lost(error: Exception, settings: ParallelSettings) -> RankLost:
    """The error of a rank that did not hear of another one."""
    rank, world = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    return RankLost(
        f"rank {rank} of {world} lost another rank: it ended, its network is cut, or it was silent for longer than "
        f"parallel.timeout_s={settings.timeout_s:g}. The same command continues from the last checkpoint "
        f"({str(error).splitlines()[0][:300]})"
    )

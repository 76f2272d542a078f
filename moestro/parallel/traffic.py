"""What a rank sends: collectives counted as they happen, whoever calls them."""

from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Traffic(TorchDispatchMode):
    """While entered, `sent` adds up the bytes that leave this rank, and `calls` counts collectives, by kind: those of
    this package, of FSDP and of anything else in the process, forward and backward.

    What stays on the rank does not count. An all-to-all sends what goes to others; of n bytes on r ranks an all-reduce
    sends 2 (r - 1) / r n (as rings do), a reduce-scatter (r - 1) / r n of its input, an all-gather (r - 1) times the
    rank's part, a broadcast (r - 1) / r n (a ring's mean over its ranks); point to point, all of it. Barriers send
    nothing. Backends may do worse; none can do better but for all-reduces in the network.

    Raises: ValueError for a collective that it does not know.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()

    @property
    def total(self) -> float:
        """All bytes sent."""
        return sum(self.sent.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            kind = func.overloadpacket.__name__.strip("_").removesuffix("_base")
            if kind not in _SENT:
                raise ValueError(f"collective {func}: its traffic is not known; allowed: {', '.join(sorted(_SENT))}")
            self.calls[kind] += 1
            self.sent[kind] += _SENT[kind](args)
        return func(*args, **(kwargs or {}))


def _group(args: tuple) -> Any:
    """The process group among a collective's arguments: the first object that is no tensor."""
    return dist.ProcessGroup.unbox(next(value for value in args if isinstance(value, torch.ScriptObject)))


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(_bytes(part) for part in value) if isinstance(value, list | tuple) else 0


def _others(args: tuple) -> float:
    size = _group(args).size()
    return (size - 1) / size


def _to_others(args: tuple) -> float:
    """Of an all-to-all into `args[0]` from `args[1]` with, last of the lists, how many rows go to each rank."""
    group, rows = _group(args), args[1]
    if not isinstance(rows, Tensor):
        return _bytes([part for rank, part in enumerate(rows) if rank != group.rank()])
    splits = args[4]
    if not splits:
        return rows.nbytes * _others(args)
    return rows.nbytes - splits[group.rank()] * rows[:1].nbytes


def _all_of(args: tuple) -> float:
    return _bytes(args[0])


_SENT: dict[str, Callable[[tuple], float]] = {
    "alltoall": _to_others,
    "allreduce": lambda args: 2 * _others(args) * _bytes(args[0]),
    "allreduce_coalesced": lambda args: 2 * _others(args) * _bytes(args[0]),
    "reduce_scatter": lambda args: _others(args) * _bytes(args[1]),
    "reduce_scatter_tensor_coalesced": lambda args: _others(args) * _bytes(args[1]),
    "allgather": lambda args: (_group(args).size() - 1) * _bytes(args[1]),
    "allgather_into_tensor_coalesced": lambda args: (_group(args).size() - 1) * _bytes(args[1]),
    "broadcast": lambda args: _others(args) * _bytes(args[0]),
    "reduce": lambda args: _others(args) * _bytes(args[0]),
    "send": _all_of,
    "recv": lambda args: 0.0,
    "barrier": lambda args: 0.0,
}

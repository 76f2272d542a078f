"""What a recipe can set about several ranks."""

from dataclasses import dataclass
from typing import Literal

from moestro.parallel.placement import Strategy

SHARDINGS = ("full", "hybrid", "none")
LONGEST_S = 31_536_000


@dataclass(frozen=True)
class ParallelSettings:
    """How several processes (ranks) train one model; alone, a process needs none of it. What is set here may change
    when a run is continued: it decides where things lie and what is sent, not what is learned.

    `sharding`: parameters, gradients and optimizer state are split over all ranks (`full`, FSDP2), or among
    ranks / replicas of them, with `replicas` copies (`hybrid`), or held whole by every rank (`none`). With `reshard` a
    block's weights are forgotten after its forward pass and gathered again in backward.

    `experts` ranks together hold the experts of every bank, each rank some of them (expert parallelism; 1: experts are
    sharded like everything else); `placement` says which rank gets which. `tables` of a million experts that train by
    rows are split by rows, or by columns of the model's width.

    `timeout_s`: after so many seconds of waiting for another rank an operation is an error. It must be longer than the
    longest thing that one rank does alone between two steps.
    """

    sharding: Literal["full", "hybrid", "none"] = "full"
    replicas: int = 1
    reshard: bool = True
    experts: int = 1
    placement: Strategy | None = None
    tables: Literal["rows", "columns"] = "rows"
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        if self.sharding not in SHARDINGS:
            raise ValueError(f"parallel sharding={self.sharding!r}, allowed: {', '.join(SHARDINGS)}")
        if self.tables not in ("rows", "columns"):
            raise ValueError(f"parallel tables={self.tables!r}, allowed: rows, columns")
        for name in ("replicas", "experts"):
            if getattr(self, name) < 1:
                raise ValueError(f"parallel {name}={getattr(self, name)}: must be at least 1")
        if self.replicas > 1 and self.sharding != "hybrid":
            raise ValueError(f"parallel replicas={self.replicas}: only with sharding: hybrid, not {self.sharding}")
        if not 0 < self.timeout_s <= LONGEST_S:
            raise ValueError(f"parallel timeout_s={self.timeout_s}: must be above 0, at most {LONGEST_S} (a year)")

    def copies(self, world: int) -> int:
        """How many ranks hold a copy of the same shard of what is sharded, of `world` ranks.

        Raises: ValueError where `replicas` or `experts` do not divide `world`.
        """
        for name in ("replicas", "experts"):
            if world % getattr(self, name):
                raise ValueError(f"parallel {name}={getattr(self, name)} does not divide the number of ranks, {world}")
        return {"full": 1, "hybrid": self.replicas, "none": world}[self.sharding]

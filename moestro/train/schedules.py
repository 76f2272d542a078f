"""Schedules: factors on the base learning rate, or on an objective's weight, as functions of progress in [0, 1].

Progress is the share of the budget that is used, so one schedule serves budgets in steps, tokens and FLOPs. `warmup`
below 1 is a share of the budget; from 1 on it counts steps, and `step_size`, the progress one step makes, converts it.
"""

import math
import sys
from dataclasses import dataclass
from typing import Literal, Protocol


class Schedule(Protocol):
    """Progress -> factor on the base learning rate."""

    @property
    def warmup(self) -> float: ...

    def __call__(self, progress: float, step_size: float = 0.0) -> float: ...


@dataclass(frozen=True)
class Scheduled:
    """An objective's weight that changes as training goes on: `weight` times the schedule's factor."""

    weight: float
    schedule: Schedule


def weight_at(weight: float | Scheduled, progress: float, steps: int) -> float:
    """The weight of the step after `steps` steps, which used `progress` of the budget."""
    if not isinstance(weight, Scheduled):
        return weight
    # before the first step nobody knows how far one goes: any warmup lies ahead
    step_size = progress / steps if steps else sys.float_info.epsilon
    return weight.weight * weight.schedule(min(1.0, progress), step_size)


@dataclass(frozen=True)
class Constant:
    """min(1, p / warmup)."""

    warmup: float = 0.0

    def __post_init__(self) -> None:
        check_warmup(self.warmup)

    def __call__(self, progress: float, step_size: float = 0.0) -> float:
        return rise(progress, warmup_share(self.warmup, step_size))


@dataclass(frozen=True)
class Cosine:
    """Linear warmup to 1, then half a cosine from 1 to `final` (Loshchilov 2017, arXiv:1608.03983)."""

    warmup: float = 0.1
    final: float = 0.1

    def __post_init__(self) -> None:
        check_warmup(self.warmup)
        check_final(self.final)

    def __call__(self, progress: float, step_size: float = 0.0) -> float:
        warm = warmup_share(self.warmup, step_size)
        if progress < warm or warm == 1:
            return rise(progress, warm)
        through = (progress - warm) / (1 - warm)
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * through)) / 2


@dataclass(frozen=True)
class WSD:
    """Warmup, then 1, then down to `final` over the last `decay` of the budget (Hu 2024, arXiv:2404.06395).

    With q the share of the decay that is over, `linear` goes down as 1 - q, `sqrt` as 1 - sqrt(q)
    (Hägele 2024, arXiv:2405.18392).
    """

    warmup: float = 0.05
    decay: float = 0.2
    final: float = 0.0
    shape: Literal["linear", "sqrt"] = "linear"

    def __post_init__(self) -> None:
        check_warmup(self.warmup)
        check_final(self.final)
        if not 0 <= self.decay <= 1:
            raise ValueError(f"schedule decay={self.decay}: allowed is 0 to 1, the share of the budget that decays")
        if self.warmup < 1 and self.warmup + self.decay > 1:
            raise ValueError(
                f"schedule warmup={self.warmup} and decay={self.decay} overlap: their sum must not exceed 1"
            )
        if self.shape not in ("linear", "sqrt"):
            raise ValueError(f"schedule shape={self.shape!r}: allowed are 'linear', 'sqrt'")

    def __call__(self, progress: float, step_size: float = 0.0) -> float:
        up = rise(progress, warmup_share(self.warmup, step_size))
        if progress <= 1 - self.decay:
            return up
        gone = min(1.0, (progress - (1 - self.decay)) / self.decay)
        left = 1 - (gone if self.shape == "linear" else math.sqrt(gone))
        return up * (self.final + (1 - self.final) * left)


def rise(progress: float, warm: float) -> float:
    """min(1, progress / warm), 1 where there is no warmup."""
    return 1.0 if progress >= warm else progress / warm


def warmup_share(warmup: float, step_size: float) -> float:
    """Warmup as a share of the budget, at most all of it."""
    return warmup if warmup < 1 else min(1.0, warmup * step_size)


def check_warmup(warmup: float) -> None:
    """Raises: ValueError unless `warmup` is a share in [0, 1) or a whole number of steps."""
    if warmup < 0 or (warmup >= 1 and warmup != int(warmup)):
        raise ValueError(
            f"schedule warmup={warmup}: allowed is a share of the budget in [0, 1) or a whole number of steps from 1 on"
        )


def check_final(final: float) -> None:
    """Raises: ValueError unless `final` is in [0, 1]."""
    if not 0 <= final <= 1:
        raise ValueError(f"schedule final={final}: allowed is 0 to 1, a factor on the learning rate")

"""An effect: a number that a paper (or we) expect in a range, measured for every seed; and whether it holds."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moestro.compare.verdict import student_factor

RULE = (
    "holds: `yes` where the 95 % interval of the mean over seeds (Student's t) lies inside the expected range, `no` "
    "where it lies outside, else `not separable from noise`"
)
Run = Mapping[str, Any]
Figure = Callable[..., float]


@dataclass(frozen=True)
class Effect:
    """`value` makes one number of the runs of `arms` (one seed, one corpus, in this order); it is expected between
    `low` and `high`. Where there are several arms the number is paired by seed."""

    id: str
    claim: str
    source: str
    quantity: str
    arms: tuple[str, ...]
    value: Figure
    low: float = -math.inf
    high: float = math.inf

    def row(self, corpus: str, runs: Mapping[int, Mapping[str, Run]]) -> dict[str, Any]:
        """The effect's entry in the results, from the runs of one corpus by seed and arm.

        Raises: ValueError where the value of a seed is not a finite number.
        """
        values = [float(self.value(*(runs[seed][arm] for arm in self.arms))) for seed in runs]
        if not all(map(math.isfinite, values)):
            raise ValueError(f"effect {self.id} on {corpus}: {self.quantity} is {values} for seeds {list(runs)}")
        interval = interval_of_mean(values)
        return {
            "effect": self.id,
            "source": self.source,
            "claim": self.claim,
            "corpus": corpus,
            "quantity": self.quantity,
            "arms": list(self.arms),
            "paired": len(self.arms) > 1,
            "expected": [bound if math.isfinite(bound) else None for bound in (self.low, self.high)],
            "measured": statistics.fmean(values),
            "spread": statistics.stdev(values) if len(values) > 1 else None,
            "interval": interval,
            "values": values,
            "holds": self.holds(interval),
        }

    def holds(self, interval: Sequence[float] | None) -> str:
        """`yes`, `no` or `not separable from noise`, by the rule above."""
        if interval is None:
            return "not separable from noise"
        low, high = interval
        if self.low <= low and high <= self.high:
            return "yes"
        return "no" if high < self.low or low > self.high else "not separable from noise"


def interval_of_mean(values: Sequence[float], level: float = 0.95) -> list[float] | None:
    """Mean -+ t s / sqrt(n); None with fewer than two values."""
    if len(values) < 2:
        return None
    half = student_factor(len(values) - 1, level) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return [mean - half, mean + half]

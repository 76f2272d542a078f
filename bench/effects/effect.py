"""An effect: a number that a paper (or we) expect in a range, measured for every seed; and whether it holds."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moestro.compare.verdict import student_factor

NOISE = "not separable from noise"
RULE = (
    "holds: `yes` where the 95 % interval of the mean over seeds (Student's t) lies inside the expected range, `no` "
    f"where it lies outside, else `{NOISE}`"
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
        expected = [bound if math.isfinite(bound) else None for bound in (self.low, self.high)]
        return {
            "effect": self.id,
            "source": self.source,
            "claim": self.claim,
            "corpus": corpus,
            "quantity": self.quantity,
            "arms": list(self.arms),
            "paired": len(self.arms) > 1,
            "expected": expected,
            "measured": statistics.fmean(values),
            "spread": statistics.stdev(values) if len(values) > 1 else None,
            "interval": interval,
            "values": values,
            "holds": verdict(interval, expected),
        }


def verdict(interval: Sequence[float] | None, expected: Sequence[float | None]) -> str:
    """`yes`, `no` or `not separable from noise`, by the rule above; `–` where nothing is expected. What lies on a bound
    with all its values (a way beside itself) is on neither side of it."""
    if all(bound is None for bound in expected):
        return "–"
    if interval is None or interval[0] == interval[1] and interval[0] in expected:
        return NOISE
    least, most = (sign * math.inf if bound is None else bound for sign, bound in zip((-1, 1), expected, strict=True))
    if least <= interval[0] and interval[1] <= most:
        return "yes"
    return "no" if interval[1] < least or interval[0] > most else NOISE


def interval_of_mean(values: Sequence[float], level: float = 0.95) -> list[float] | None:
    """Mean -+ t s / sqrt(n); None with fewer than two values."""
    if len(values) < 2:
        return None
    half = student_factor(len(values) - 1, level) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return [mean - half, mean + half]

"""Steps whose loss, objectives or gradients are not finite: they end the run, or change nothing and are counted."""

import math
from collections.abc import Mapping

from moestro.train.counters import Counters
from moestro.train.settings import TrainSettings
from moestro.train.step import Measured


class NonFiniteLoss(RuntimeError):
    """The loss, an objective or the gradient is infinite or not a number."""


def non_finite(figures: Mapping[str, float]) -> str:
    """The figures that are infinite or not a number, in words; empty where there are none."""
    return ", ".join(f"{name} = {value}" for name, value in figures.items() if not math.isfinite(value))


def to_skip(measured: Measured, counters: Counters, settings: TrainSettings, lr: float) -> str:
    """What is not finite about a step that is to change nothing, in words, once it is counted; empty for any other.

    Raises: NonFiniteLoss where `settings.non_finite` is stop, or more than `settings.most_skipped` steps one after the
    other were not finite: then it is the weights, not a batch.
    """
    broken = non_finite(measured.signs_of_health)
    counters.skipped_in_a_row = counters.skipped_in_a_row + 1 if broken else 0
    if not broken:
        return ""
    if settings.non_finite == "stop":
        require_finite(measured.signs_of_health, counters.step, lr, ", or leave such steps out (train.non_finite=skip)")
    if counters.skipped_in_a_row > settings.most_skipped:
        row = f", the last of {counters.skipped_in_a_row} steps in a row (train.most_skipped={settings.most_skipped})"
        require_finite(measured.signs_of_health, counters.step, lr, row)
    counters.skipped += 1
    return broken


def require_finite(figures: Mapping[str, float], step: int, lr: float, more: str = "") -> None:
    """Raises: NonFiniteLoss naming step, culprit and what to try."""
    if broken := non_finite(figures):
        raise NonFiniteLoss(
            f"step {step}: {broken} (learning rate {lr:.3g}){more}. Try, in a new run folder, a lower optim.lr, a "
            "longer schedule warmup, a smaller optim.clip, or train.precision: fp32. This folder is as the step before "
            "left it; its checkpoints can be used"
        )

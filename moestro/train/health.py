"""Steps that are not sound, a loss or gradients not finite or far beyond the usual: they end the run, or change nothing
and are counted."""

import math
from collections.abc import Mapping

from moestro.train.counters import Counters
from moestro.train.settings import TrainSettings
from moestro.train.step import Measured

# sound steps before anything is usual
SETTLED = 20


class Diverged(RuntimeError):
    """The loss, an objective or the gradient is infinite, not a number, or far beyond what was usual."""


def non_finite(figures: Mapping[str, float]) -> str:
    """The figures that are infinite or not a number, in words; empty where there are none."""
    return ", ".join(f"{name} = {value}" for name, value in figures.items() if not math.isfinite(value))


def spiking(measured: Measured, counters: Counters, spike: float | None) -> str:
    """What of loss and gradient norm is more than `spike` times its mean over the sound steps before, in words; empty
    where nothing is, nobody asked, or fewer than `SETTLED` steps say what is usual."""
    if spike is None or counters.usual_over < SETTLED:
        return ""
    now = {"loss": (measured.loss, counters.usual_loss), "gradient norm": (measured.grad_norm, counters.usual_norm)}
    found = [
        f"{name} = {value:.4g}, usual {usual:.4g}" for name, (value, usual) in now.items() if value > spike * usual
    ]
    return f"{'; '.join(found)} (train.spike={spike:g})" if found else ""


def to_skip(measured: Measured, counters: Counters, settings: TrainSettings, lr: float) -> str:
    """What is not sound about a step that is to change nothing, in words, once it is counted; empty for any other.

    Raises: Diverged where `settings.non_finite` is stop, or more than `settings.most_skipped` steps one after the
    other were not sound: then it is the weights, not a batch.
    """
    broken = non_finite(measured.signs_of_health) or spiking(measured, counters, settings.spike)
    counters.skipped_in_a_row = counters.skipped_in_a_row + 1 if broken else 0
    if not broken:
        counters.settle(measured)
        return ""
    if settings.non_finite == "stop":
        raise _diverged(broken, counters.step, lr, ", or leave such steps out (train.non_finite=skip)")
    if counters.skipped_in_a_row > settings.most_skipped:
        row = f", the last of {counters.skipped_in_a_row} steps in a row (train.most_skipped={settings.most_skipped})"
        raise _diverged(broken, counters.step, lr, row)
    counters.skipped += 1
    return broken


def require_finite(figures: Mapping[str, float], step: int, lr: float) -> None:
    """Raises: Diverged naming step, culprit and what to try."""
    if broken := non_finite(figures):
        raise _diverged(broken, step, lr)


def _diverged(broken: str, step: int, lr: float, more: str = "") -> Diverged:
    return Diverged(
        f"step {step}: {broken} (learning rate {lr:.3g}){more}. Try, in a new run folder, a lower optim.lr, a "
        "longer schedule warmup, a smaller optim.clip, or train.precision: fp32. This folder is as the step before "
        "left it; its checkpoints can be used"
    )

"""Lines of metrics: to metrics.jsonl, TensorBoard and the display."""

import time
from typing import Any, Self

from moestro.train.counters import Counters
from moestro.train.folder import RunFolder
from moestro.train.progress import Display
from moestro.train.settings import TrainSettings
from moestro.train.step import Measured


class MetricsLog:
    """Writes one line for every optimizer step and every evaluation.

    All entries but `time` depend on the recipe and the data alone; `time` holds what the clock adds.
    """

    def __init__(self, folder: RunFolder, settings: TrainSettings, counters: Counters, display: Display) -> None:
        self.file = folder.open_metrics(counters.metrics_bytes, counters.metrics_sha256)
        self.counters, self.display = counters, display
        self.budget = settings.budget
        self.board = open_board(folder, counters.step, display) if settings.tensorboard and folder.main else None

    def __enter__(self) -> Self:
        self.before = time.perf_counter()
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()

    def sync(self) -> int:
        """Force all lines to the disk and note their hash; returns the file's size in bytes."""
        size = self.file.sync()
        self.counters.metrics_sha256 = self.file.sha256
        return size

    def step(self, measured: Measured, lr: float, peak: float | None, broken: str) -> None:
        """The line of one optimizer step; `broken` says what of it was not finite, where it was skipped for that."""
        counters = self.counters
        figures: dict[str, Any] = {
            "loss": measured.loss,
            "total_loss": measured.total_loss,
            "objectives": measured.objectives,
            "lr": lr,
            "grad_norm": measured.grad_norm,
            "bpb": measured.bpb,
        }
        line = {
            "step": counters.step,
            "tokens": counters.tokens,
            "flops": counters.flops,
            "flops_computed": counters.flops_computed,
            **(figures if not broken else {"skipped": broken, "lr": lr}),
            "active_params": measured.active_params,
            "time": self.lap(measured, peak),
        }
        self.write(line)

    def lap(self, measured: Measured, peak: float | None) -> dict[str, float]:
        """Times of the step that just ended; `seconds` counts training alone, over all processes of the run."""
        seconds = self.skip()
        self.counters.seconds += seconds
        times = {
            "seconds": self.counters.seconds,
            "step_seconds": seconds,
            "tokens_per_s": measured.tokens / seconds,
        }
        return times if peak is None else {**times, "mfu": measured.flops / seconds / peak}

    def skip(self) -> float:
        """Seconds since the last call: what happened in between is not training time."""
        now = time.perf_counter()
        seconds, self.before = now - self.before, now
        return seconds

    def evaluation(self, figures: dict[str, float]) -> None:
        """The line of one evaluation."""
        self.write({"step": self.counters.step, "eval": figures})

    def write(self, line: dict[str, Any]) -> None:
        """One line, everywhere."""
        self.file.write(line)
        if self.board is not None:
            for name, value in scalars(line):
                self.board.add_scalar(name, value, line["step"])
        self.display.show(line, self.counters.share(self.budget))


def scalars(line: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """The numbers of a line under slash-separated names; words are left out."""
    found: list[tuple[str, float]] = []
    for key, value in line.items():
        if isinstance(value, dict):
            found += scalars(value, f"{prefix}{key}/")
        elif key != "step" and not isinstance(value, str):
            found.append((prefix + key, value))
    return found


def open_board(folder: RunFolder, step: int, display: Display) -> Any | None:
    """A TensorBoard writer that hides what a killed process wrote after `step`; None, said once, where TensorBoard is
    not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        display.message("TensorBoard is not installed (pip install 'moestro[tensorboard]'): metrics.jsonl only")
        return None
    return SummaryWriter(str(folder.path / "tensorboard"), purge_step=step + 1)

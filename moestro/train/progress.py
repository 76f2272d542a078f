"""What a training run shows while it runs: a bar on a terminal, plain lines elsewhere, or nothing."""

import time
from collections.abc import Callable
from typing import Protocol, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn


class Display(Protocol):
    """Told of every line of metrics, and of messages. `share` is the share of the budget that is used."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...

    def show(self, line: dict, share: float) -> None: ...

    def message(self, text: str) -> None: ...


class Silent:
    """Shows nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def show(self, line: dict, share: float) -> None:
        return None

    def message(self, text: str) -> None:
        return None


class Lines(Silent):
    """A line for the first step, then one every `seconds`, and one for every evaluation."""

    def __init__(self, stream: TextIO, title: str = "", seconds: float = 10.0) -> None:
        self.stream, self.title, self.seconds = stream, title, seconds
        self.last = -float("inf")
        self.remaining = Remaining()

    def __enter__(self) -> Self:
        self.last, self.remaining = -float("inf"), Remaining()
        return self

    def show(self, line: dict, share: float) -> None:
        left = self.remaining(share)
        now = time.monotonic()
        if "eval" in line:
            self.message(f"step {line['step']}  {describe_evaluation(line['eval'])}")
        elif now - self.last >= self.seconds or share >= 1:
            self.last = now
            self.message(f"step {line['step']}  {share:4.0%}  {describe(line)}  {left}")

    def message(self, text: str) -> None:
        print(f"{self.title}  {text}" if self.title else text, file=self.stream, flush=True)


class Bar:
    """A progress bar with the last step's figures beside it; evaluations and messages scroll above it."""

    def __init__(self, title: str = "", console: Console | None = None) -> None:
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TaskProgressColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
        )
        self.task = self.bar.add_task(title or "training", total=1.0, figures="")
        self.remaining = Remaining()

    def __enter__(self) -> Self:
        self.remaining = Remaining()
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def show(self, line: dict, share: float) -> None:
        left = self.remaining(share)
        if "eval" in line:
            self.message(f"step {line['step']}  {describe_evaluation(line['eval'])}")
        else:
            self.bar.update(self.task, completed=min(1.0, share), figures=f"{describe(line)}  {left}")

    def message(self, text: str) -> None:
        self.bar.console.print(text, highlight=False, markup=False)


class Remaining:
    """Share of the budget -> remaining time as text, from the speed since the first call."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.start: tuple[float, float] | None = None

    def __call__(self, share: float) -> str:
        now = self.clock()
        if self.start is None:
            self.start = now, share
        began, first = self.start
        if share <= first:
            return "-:-- left"
        seconds = (now - began) * (1 - min(1.0, share)) / (share - first)
        return f"{duration(seconds)} left"


def display_on(stream: TextIO, title: str = "") -> Display:
    """A bar where `stream` is a terminal, else plain lines."""
    return Bar(title, Console(file=stream)) if stream.isatty() else Lines(stream, title)


def describe(line: dict) -> str:
    """The figures of one optimizer step."""
    timing = line["time"]
    parts = [
        *(
            [f"skipped: {line['skipped']}"]
            if "skipped" in line
            else [f"loss {line['loss']:.3f}", f"{line['bpb']:.3f} bpb"]
        ),
        f"{short(timing['tokens_per_s'])} tok/s",
        f"{short(line['active_params'])} active",
    ]
    if "mfu" in timing:
        parts.append(f"MFU {timing['mfu']:.1%}")
    return "  ".join(parts)


def describe_evaluation(figures: dict) -> str:
    """The figures of one evaluation."""
    return (
        f"held out: loss {figures['loss']:.4f}  {figures['bpb']:.4f} bpb  "
        f"perplexity {figures['perplexity']:.2f}  ({short(figures['tokens'])} tokens)"
    )


def short(number: float) -> str:
    """1234567 -> 1.23M: three digits and a unit."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """3725 -> 1:02:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

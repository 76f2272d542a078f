"""What a comparison shows while it runs: every run in progress, and the time that remains."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn

from moestro.compare.job import Job
from moestro.train.progress import duration


class Board:
    """Bars on a terminal; elsewhere a line for every finished run and every half minute."""

    interval = 0.5

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.bars = Progress(
            TextColumn("{task.description:<28}"),
            BarColumn(bar_width=30),
            TaskProgressColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.jobs: Sequence[Job] = ()
        self.tasks: dict[str, TaskID] = {}
        self.spoken = 0.0

    def start(self, jobs: Sequence[Job], what: str) -> None:
        """Say what will be run."""
        self.jobs = jobs
        finished = sum(job.summary is not None for job in jobs)
        self.console.print(f"{len(jobs)} runs: {what}; {finished} finished earlier", soft_wrap=True)

    def __enter__(self) -> Self:
        self.begun, self.share_begun = time.monotonic(), self.share()
        self.bars.start()
        self.overall = self.bars.add_task("all runs", total=1.0, note="")
        return self

    def __exit__(self, *exception: object) -> None:
        self.bars.stop()

    def share(self) -> float:
        """How much of all runs' budgets is used."""
        return sum(job.progress() for job in self.jobs) / len(self.jobs)

    def remaining(self, share: float) -> str:
        """Time to the end at the rate since the start."""
        gained, elapsed = share - self.share_begun, time.monotonic() - self.begun
        if gained <= 0 or elapsed < 5:
            return "estimating the time that remains"
        return f"about {duration(elapsed * (1 - share) / gained)} remaining"

    def refresh(self) -> None:
        """Bring the bars up to date."""
        for job in self.jobs:
            share = job.progress()
            if 0 < share < 1 or job.name in self.tasks:
                task = self.tasks.get(job.name)
                if task is None:
                    task = self.tasks[job.name] = self.bars.add_task(job.name, total=1.0, note="")
                self.bars.update(task, completed=share, visible=share < 1)
        share = self.share()
        note = self.remaining(share)
        self.bars.update(self.overall, completed=share, note=note)
        if self.bars.disable and time.monotonic() - self.spoken > 30:
            self.spoken = time.monotonic()
            self.console.print(f"{share:.0%} of all runs, {note}", soft_wrap=True)

    def finished(self, job: Job, summary: Mapping[str, Any]) -> None:
        """Say what a run came to."""
        self.console.print(f"{job.name}: {summary['final']['bpb']:.4f} bits per byte", soft_wrap=True)

    def failed(self, job: Job, error: str) -> None:
        """Say why a run failed."""
        self.console.print(f"{job.name} FAILED: {error}", style="red", soft_wrap=True, markup=False)

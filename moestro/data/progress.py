"""A progress bar with the time remaining, for the work that a first run does once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Report = Callable[[str, float | None], None]  # (stage, share done or None where unknown)


def silent(stage: str, done: float | None) -> None:
    """A Report that shows nothing."""


@contextmanager
def progress_bar(enabled: bool) -> Iterator[Report]:
    """A Report that draws one bar a stage on stderr."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    stages: dict[str, TaskID] = {}
    with Progress(*columns, console=Console(stderr=True), disable=not enabled) as bar:

        def report(stage: str, done: float | None) -> None:
            if stage not in stages:
                stages[stage] = bar.add_task(stage, total=None)
            if done is not None:
                bar.update(stages[stage], completed=done, total=1.0)

        yield report

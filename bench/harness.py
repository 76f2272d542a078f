"""How every benchmark here measures and reports: interleaved rounds, medians, one JSON format.

JSON: {"script", "commit", "machine", "seed", "rows"}; a timing row is {"case", "what", "unit", "ours", "peer",
"theirs", "ratio", "spread"} with ratio > 1 where ours is better; `spread` is the 10th and 90th percentile of the
ratio over the rounds. The process keeps freed memory, as in training: no side waits for the system to clear pages.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from moestro.train.memory import keep_freed_memory

ROOT = Path(__file__).resolve().parent.parent
# milliseconds of every contestant, round by round
Times = dict[str, list[float]]


@dataclass(frozen=True)
class Row:
    """One comparison; `ratio` > 1 means that ours is better, but where a script says another thing of it."""

    case: str
    what: str
    unit: str
    ours: float
    peer: str
    theirs: float
    ratio: float
    spread: tuple[float, float]


def arguments(description: str, paths: Mapping[str, str] | None = None, **flags: str) -> argparse.Namespace:
    """The options that every script under bench/ has, and its own: paths and switches, by name and help."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="smaller shapes, under a minute on 2 cores")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the rows as JSON")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of each side")
    for name, text in (paths or {}).items():
        parser.add_argument(f"--{name}", type=Path, metavar="PATH", help=text)
    for name, text in flags.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    parsed = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(parsed.threads)
    torch.manual_seed(parsed.seed)
    return parsed


def clock(
    contestants: dict[str, Callable], rounds: int, timed: Callable[[Callable], float] | None = None, warm_up: int = 1
) -> Times:
    """Milliseconds of every contestant in interleaved rounds A B C A B C; `timed` takes the time of one call (by
    default the wall clock's)."""
    times: Times = {name: [] for name in contestants}
    for turn in range(warm_up + rounds):
        for name, run in contestants.items():
            took = (timed or wall)(run)
            if turn >= warm_up:
                times[name].append(took)
    return times


def wall(run: Callable) -> float:
    """Milliseconds of one call by the wall clock."""
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def compare(case: str, what: str, times: Times, unit: str = "ms") -> list[Row]:
    """A row for every contestant but `ours`: times in milliseconds or microseconds (`us`), other units as they are."""
    scale = 1e3 if unit == "us" else 1.0
    mine = times["ours"]
    return [
        Row(case, what, unit, scale * median(mine), name, scale * median(theirs), *_ratios(theirs, mine))
        for name, theirs in times.items()
        if name != "ours"
    ]


def rate(case: str, what: str, times: Times, amount: dict[str, float], unit: str = "GFLOP/s") -> list[Row]:
    """FLOPs (or bytes, as GB/s) a time of `ours` beside those of every other contestant in `amount`; ratio 1 means as
    fast."""
    speed = {name: [amount[name] / took / 1e6 for took in times[name]] for name in amount}
    mine = speed["ours"]
    return [
        Row(case, what, unit, median(mine), name, median(theirs), *_ratios(mine, theirs))
        for name, theirs in speed.items()
        if name != "ours"
    ]


def _ratios(above: list[float], below: list[float]) -> tuple[float, tuple[float, float]]:
    """Median of the ratios round by round, and their 10th and 90th percentile."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    tenths = quantiles(ratios, n=10, method="inclusive")
    return median(ratios), (tenths[0], tenths[-1])


def weigh(case: str, ours: Callable, peers: dict[str, Callable]) -> list[Row]:
    """Peak memory of one forward pass in training: what is kept for the backward pass, and scratch space (MiB)."""
    mine = activation_memory(ours)
    rows = []
    for name, run in peers.items():
        theirs = activation_memory(run)
        ratio = theirs / mine
        rows.append(Row(case, "activation memory", "MiB", mine, name, theirs, ratio, (ratio, ratio)))
    return rows


def activation_memory(forward: Callable) -> float:
    """Largest sum of live allocations during a forward pass whose result is kept, in MiB."""
    forward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        kept = forward()
    events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    del kept
    return peak / 2**20


def agree(name: str, have: torch.Tensor, want: torch.Tensor, tolerance: float, ties: float = 0.0) -> None:
    """Exit with an error where two results differ by more than `tolerance` of the norm: never time a wrong answer.

    The share `ties` of the rows, those that differ most, may differ by anything: of scores that are equal but for
    rounding, sides may choose different ones.
    """
    have, want = have.detach().double(), want.detach().double()
    each = (have - want).reshape(len(want), -1).norm(dim=1).sort().values
    error = float(each[: len(each) - int(ties * len(each))].norm() / want.norm())
    if not error <= tolerance or not have.isfinite().all():
        sys.exit(f"{name}: relative error {error:.2e} > {tolerance:.0e}; nothing was timed")


def report(
    script: str,
    rows: list[Row],
    options: argparse.Namespace,
    absent: Sequence[str] = (),
    said: str = "ratio > 1: ours is better",
) -> None:
    """Print the rows, with what is said of their ratios, and what could not be compared; write the rows where `--json`
    says."""
    table = Table(title=script, caption=f"{said}; brackets: 10th and 90th percentile over rounds")
    for column in ("case", "what", "ours", "peer", "theirs", "ratio"):
        table.add_column(column, justify="right" if column in ("ours", "theirs", "ratio") else "left")
    for row in rows:
        ratio = f"{row.ratio:.2f} [{row.spread[0]:.2f}, {row.spread[1]:.2f}]"
        table.add_row(row.case, row.what, f"{row.ours:.1f} {row.unit}", row.peer, f"{row.theirs:.1f} {row.unit}", ratio)
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    for line in absent:
        console.print(line)
    if options.json:
        facts = {"script": script, "commit": commit(), "machine": machine(options.threads), "seed": options.seed}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**facts, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


def commit() -> str:
    """The commit of the working tree, marked where it has uncommitted changes."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=ROOT, capture_output=True, text=True
    )
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def machine(threads: int) -> dict:
    """What the numbers were measured on."""
    model = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    facts = {"cpu": model, "cores": os.cpu_count(), "threads": threads, "load": os.getloadavg()[0]}
    return {**facts, "python": platform.python_version(), "torch": torch.__version__}


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []

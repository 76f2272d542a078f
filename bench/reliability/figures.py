"""The one format of what is counted here: a figure, and what it has to be.

JSON under bench/results/reliability/: {"script", "commit", "machine", "seed", "figures"}; a figure is {"case", "what",
"unit", "value", "wanted", "holds"}; `wanted` says in words what it has to be, `holds` whether it is (null: it is told,
nothing is asked of it). Counts do not depend on what else the machine does; seconds and bytes may.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.harness import commit, machine


@dataclass(frozen=True)
class Figure:
    """One number of a case; `holds` is None where nothing is asked of it."""

    case: str
    what: str
    value: float
    unit: str = ""
    wanted: str = ""
    holds: bool | None = None


def report(script: str, figures: Sequence[Figure], options: argparse.Namespace) -> None:
    """Print the figures, write them where `options.json` says, and exit with an error where one does not hold."""
    table = Table(title=script)
    for column in ("case", "what", "value", "wanted", "holds"):
        table.add_column(column, justify="right" if column == "value" else "left")
    for figure in figures:
        table.add_row(*cells(asdict(figure)))
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    if options.json:
        facts = {"script": script, "commit": commit(), "machine": machine(options.threads), "seed": options.seed}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        content = {**facts, "figures": [asdict(figure) for figure in figures]}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    if any(figure.holds is False for figure in figures):
        sys.exit("a figure is not what it has to be: see the table")


def cells(figure: Mapping[str, Any]) -> list[str]:
    """A figure as the five cells of its line."""
    value = figure["value"]
    number = f"{value:,}" if isinstance(value, int) else f"{value:,.3g}" if abs(value) < 100 else f"{value:,.0f}"
    holds = {True: "yes", False: "**no**", None: ""}[figure["holds"]]
    return [figure["case"], figure["what"], f"{number} {figure['unit']}".strip(), figure["wanted"], holds]


def reliability_summary(result: Mapping[str, Any]) -> str:
    """Where the figures come from, and one line for each, as Markdown: for docs/reliability.md."""
    where = result["machine"]
    head = (
        f"`{result['script']}` at commit `{result['commit']}`, seed {result['seed']}, {where['cpu']}, "
        f"{where['threads']} threads, torch {where['torch']}, Python {where['python']}:"
    )
    lines = ["| case | what | value | wanted | holds |", "|---|---|---|---|---|"]
    lines += [f"| {' | '.join(cells(figure))} |" for figure in result["figures"]]
    return "\n".join([head, "", *lines])

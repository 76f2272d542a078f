"""Figures of tasks, for a terminal."""

from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.table import Table

from moestro.recipe.evaluation import plain_table


def tasks_table(figures: Mapping[str, Any]) -> Group:
    """What `evaluate_tasks` returned: a row for every metric, with its standard error."""
    titles = ("task", "rows", "metric", "value", "± stderr")
    first = "" if figures["limit"] is None else f", the first {figures['limit']:,} rows of each"
    table: Table = plain_table(f"{figures.get('model', 'model')}, lm-eval {figures['lm_eval']}{first}", titles)
    for task, each in figures["tasks"].items():
        for number, (metric, found) in enumerate(each["metrics"].items()):
            head = ("", "") if number else (task, f"{each['n']:,}")
            spread = "" if found["stderr"] is None else _rounded(found["stderr"])
            table.add_row(*head, metric, _rounded(found["value"]), spread)
    cut = [f"{task} {each['cut']:.1%}" for task, each in figures["tasks"].items() if each["cut"]]
    notes = [f"contexts cut to the model's {figures['max_length']:,} tokens: {', '.join(cut)}"] if cut else []
    return Group(table, *notes)


def _rounded(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.3e}"

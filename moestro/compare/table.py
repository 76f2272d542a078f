"""The table of arms: the same rows for the terminal and for the page."""

from collections.abc import Mapping
from dataclasses import dataclass

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from moestro.compare.numerals import MISSING, NO_BREAK, is_number, mean_and_spread, scientific, si, signed
from moestro.compare.verdict import Cell, cells, common_decimals, headline, main_verdict, run_status, title_of

COLUMNS = {
    "arm": "Arm",
    "budget": "Budget",
    "size": "Size",
    "bpb": "Val. bits/byte",
    "gap": "vs {reference}",
    "total": "Params",
    "active": "Active",
    "useful": "Useful FLOPs/token",
    "computed": "Computed",
    "tokens": "Tokens seen",
    "speed": "Tokens/s",
    "seeds": "Seeds",
}
TERMINAL_TITLES = {
    "bpb": "Val.\nbits/byte",
    "useful": "FLOPs/\ntoken",
    "computed": "Com-\nputed",
    "total": "Total",
    "tokens": "Tokens\nseen",
    "speed": "Tok/s",
}


@dataclass(frozen=True)
class Row:
    """One arm at one size and budget: a text and a number to sort by for every column."""

    cell: Cell
    lowest: bool
    texts: Mapping[str, str]
    numbers: Mapping[str, float | None]


def column_titles(results: Mapping) -> dict[str, str]:
    """The columns that say something: size and budget only where there are several, the gap where a reference is."""
    titles = dict(COLUMNS)
    reference = results.get("reference")
    if reference in results["arms"]:
        titles["gap"] = titles["gap"].format(reference=title_of(results, results["reference"]))
    else:
        del titles["gap"]
    for column, plural in (("size", "sizes"), ("budget", "budgets")):
        if len(results[plural]) < 2:
            del titles[column]
    return titles


def seeds_text(cell: Cell, n_planned: int) -> str:
    """`3 of 3`, or what became of the missing ones."""
    if not cell.runs and not cell.unfinished:
        return "not run"
    count = f"{len(cell.runs)} of {max(n_planned, len(cell.runs) + len(cell.unfinished))}"
    statuses = [run_status(run) for run in cell.unfinished]
    return ", ".join([count, *(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses))])


def per_token(cell: Cell, field: str) -> float | None:
    """Training FLOPs a token, by the count in `field`."""
    flops, tokens = cell.average(field), cell.average("tokens")
    return flops / tokens if flops is not None and tokens else None


def _row(cell: Cell, reference: Cell | None, lowest: bool, results: Mapping, decimals: int) -> Row:
    gap, gap_text = None, MISSING
    if cell.runs and reference is not None and reference.runs and reference.arm != cell.arm:
        gap = cell.mean - reference.mean
        gap_text = f"{signed(gap, decimals)} ({100 * abs(gap) / reference.mean:.1f}{NO_BREAK}%)"
    numbers = {
        "bpb": cell.mean if cell.runs else None,
        "gap": gap,
        "budget": cell.budget,
        "total": cell.average("params_total"),
        "active": cell.average("params_active"),
        "useful": per_token(cell, "flops"),
        "computed": per_token(cell, "flops_computed"),
        "tokens": cell.average("tokens"),
        "speed": cell.average("tokens_per_s"),
        "seeds": len(cell.runs),
    }
    texts = {
        "arm": title_of(results, cell.arm),
        "size": cell.size,
        "bpb": mean_and_spread(numbers["bpb"], cell.std, decimals),
        "gap": gap_text,
        "seeds": seeds_text(cell, len(results.get("seeds") or [])),
        **{column: si(numbers[column]) for column in ("total", "active", "tokens", "speed")},
        **{column: scientific(numbers[column]) for column in ("budget", "useful", "computed")},
    }
    return Row(cell, lowest, texts, numbers)


def arm_rows(results: Mapping) -> list[Row]:
    """A row for every planned (budget, size, arm); `lowest` marks the lowest mean among equal budget and size."""
    every, decimals = cells(results), common_decimals(results)
    groups: dict[tuple[float, str], list[Cell]] = {}
    for cell in every:
        groups.setdefault((cell.budget, cell.size), []).append(cell)
    rows = []
    for group in groups.values():
        finished = [cell for cell in group if cell.runs]
        lowest = min(finished, key=lambda cell: cell.mean) if len(finished) > 1 else None
        reference = next((cell for cell in group if cell.arm == results.get("reference")), None)
        for cell in group:
            rows.append(_row(cell, reference, cell is lowest, results, decimals))
    return rows


def _terminal_texts(row: Row) -> dict[str, str]:
    """The row's texts, shortened: the terminal has 80 columns."""
    useful, computed = row.numbers["useful"], row.numbers["computed"]
    return {
        **row.texts,
        "gap": row.texts["gap"].split(" ")[0],
        "computed": f"×{computed / useful:.2f}" if useful and computed else MISSING,
        "seeds": row.texts["seeds"].replace(" of ", "/"),
    }


def _incomplete(row: Row, results: Mapping) -> bool:
    return bool(row.cell.unfinished) or len(row.cell.runs) != len(results.get("seeds") or [])


def comparison_table(results: Mapping) -> Group:
    """The arms as a rich table for the terminal, the verdict below it, which wraps where the terminal ends."""
    rows, titles = arm_rows(results), column_titles(results)
    columns = [column for column in titles if column != "seeds" or any(_incomplete(row, results) for row in rows)]
    table = Table(
        title=Text(str(results.get("title", "comparison"))),
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
        title_justify="left",
    )
    for column in columns:
        title = TERMINAL_TITLES.get(column, titles[column].replace(" ", "\n", 1))
        words = column in ("arm", "size")
        table.add_column(
            Text(title),
            justify="left" if words else "right",
            no_wrap=column not in ("arm", "seeds"),
            min_width=5 if column == "arm" else None,
        )
    group = None
    for row in rows:
        if group not in (None, (row.cell.budget, row.cell.size)):
            table.add_section()
        group = (row.cell.budget, row.cell.size)
        style = "bold" if row.lowest else "dim" if not row.cell.runs else ""
        texts = _terminal_texts(row)
        table.add_row(*(Text(texts[column], style=style) for column in columns))
    return Group(table, Text("\n" + headline(results, main_verdict(results))))


def run_rows(results: Mapping) -> list[list[str]]:
    """Every single run, with its state: the raw material of the means."""
    rows = []
    for run in results["runs"]:
        final = run.get("final") or {}
        bpb, perplexity = final.get("bpb"), final.get("perplexity")
        rows.append(
            [
                title_of(results, run["arm"]),
                scientific(run["budget"]),
                str(run["size"]),
                str(run.get("seed")),
                run_status(run) + (f": {run['error']}" if run.get("error") else ""),
                f"{bpb:.4f}" if is_number(bpb) else MISSING,
                f"{perplexity:.2f}" if is_number(perplexity) else MISSING,
                si(run.get("tokens")),
                *(scientific(run.get(field)) for field in ("flops", "flops_computed")),
                si(run.get("tokens_per_s")),
                str(run.get("run_dir") or MISSING),
            ]
        )
    return rows

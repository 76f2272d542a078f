"""The table of arms: the same rows for the terminal and for the page."""

from collections.abc import Mapping
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

from moestro.compare.numerals import MISSING, is_number, mean_and_spread, percent, scientific, si, signed
from moestro.compare.verdict import Cell, cells, headline, main_verdict, run_status

COLUMNS = {
    "arm": "Arm",
    "budget": "Budget",
    "size": "Size",
    "bpb": "Val. bits/byte",
    "gap": "vs {reference}",
    "total": "Params",
    "active": "Active",
    "useful": "Useful FLOPs/token",
    "computed": "Computed FLOPs/token",
    "tokens": "Tokens seen",
    "speed": "Tokens/s",
    "seeds": "Seeds",
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
        titles["gap"] = titles["gap"].format(reference=results["arms"][reference].get("title", reference))
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


def computed_per_token(cell: Cell) -> float | None:
    """Forward FLOPs a token that were executed, padding and unused rows included."""
    useful, trained, computed = (cell.average(f) for f in ("used_flops_per_token", "flops", "flops_computed"))
    return useful * computed / trained if useful and trained and computed else None


def _row(cell: Cell, reference: Cell | None, lowest: bool, title: str, n_planned: int) -> Row:
    gap, gap_text = None, MISSING
    if cell.runs and reference is not None and reference.runs and reference.arm != cell.arm:
        gap = cell.mean - reference.mean
        gap_text = f"{signed(gap)} ({percent(abs(gap) / reference.mean)})"
    numbers = {
        "bpb": cell.mean if cell.runs else None,
        "gap": gap,
        "budget": cell.budget,
        "total": cell.average("params_total"),
        "active": cell.average("params_active"),
        "useful": cell.average("used_flops_per_token"),
        "computed": computed_per_token(cell),
        "tokens": cell.average("tokens"),
        "speed": cell.average("tokens_per_s"),
        "seeds": len(cell.runs),
    }
    texts = {
        "arm": title,
        "size": cell.size,
        "bpb": mean_and_spread(numbers["bpb"], cell.std),
        "gap": gap_text,
        "seeds": seeds_text(cell, n_planned),
        **{column: si(numbers[column]) for column in ("total", "active", "tokens", "speed")},
        **{column: scientific(numbers[column]) for column in ("budget", "useful", "computed")},
    }
    return Row(cell, lowest, texts, numbers)


def arm_rows(results: Mapping) -> list[Row]:
    """A row for every planned (budget, size, arm); `lowest` marks the lowest mean among equal budget and size."""
    every = cells(results)
    groups: dict[tuple[float, str], list[Cell]] = {}
    for cell in every:
        groups.setdefault((cell.budget, cell.size), []).append(cell)
    rows = []
    for group in groups.values():
        finished = [cell for cell in group if cell.runs]
        lowest = min(finished, key=lambda cell: cell.mean) if len(finished) > 1 else None
        reference = next((cell for cell in group if cell.arm == results.get("reference")), None)
        for cell in group:
            title = str(results["arms"].get(cell.arm, {}).get("title") or cell.arm)
            rows.append(_row(cell, reference, cell is lowest, title, len(results.get("seeds") or [])))
    return rows


def comparison_table(results: Mapping) -> Table:
    """The arms as a rich table for the terminal, the verdict below it."""
    titles = column_titles(results)
    verdict = main_verdict(results)
    table = Table(
        title=Text(str(results.get("title", "comparison"))),
        caption=Text(headline(results, verdict)),
        box=box.SIMPLE_HEAD,
        caption_justify="left",
        title_justify="left",
    )
    for column, title in titles.items():
        words = title if column not in ("useful", "computed") else title.replace(" FLOPs", "\nFLOPs")
        table.add_column(Text(words), justify="left" if column in ("arm", "size") else "right", no_wrap=column == "bpb")
    group = None
    for row in arm_rows(results):
        if group not in (None, (row.cell.budget, row.cell.size)):
            table.add_section()
        group = (row.cell.budget, row.cell.size)
        style = "bold" if row.lowest else "dim" if not row.cell.runs else ""
        table.add_row(*(Text(row.texts[column], style=style) for column in titles))
    return table


def run_rows(results: Mapping) -> list[list[str]]:
    """Every single run, with its state: the raw material of the means."""
    rows = []
    for run in results["runs"]:
        final = run.get("final") or {}
        bpb, perplexity = final.get("bpb"), final.get("perplexity")
        rows.append(
            [
                str(results["arms"][run["arm"]].get("title") or run["arm"]),
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

"""The sections of the report on how well the arms did: verdict, tables, loss curves, isoFLOP curves."""

from collections.abc import Mapping
from functools import partial

from moestro.compare import charts
from moestro.compare.curves import cell_curve, loss_curves
from moestro.compare.looks import Look
from moestro.compare.markup import details, paragraph, plain_table, scrolling, tabs
from moestro.compare.numerals import is_number, mean_and_spread, percent, signed, significant
from moestro.compare.plots import escape, padded, responsive
from moestro.compare.table import Row, arm_rows, column_titles
from moestro.compare.verdict import (
    RULE,
    Cell,
    Verdict,
    budget_text,
    cells,
    common_decimals,
    compare,
    headline,
    judge,
    title_of,
    unranked,
)


def _zlib(results: Mapping) -> float | None:
    value = (results.get("corpus") or {}).get("zlib_bpb")
    return value if is_number(value) else None


def _zlib_note(results: Mapping) -> str:
    zlib = _zlib(results)
    if zlib is None:
        return ""
    return (
        f" zlib reaches {zlib:.3f} bits per byte on the same corpus; a dotted line marks it where it lies on the axis."
    )


def result(results: Mapping, verdict: Verdict, looks: Mapping[str, Look]) -> str:
    parts = [f"<h1>{escape(headline(results, verdict))}</h1>"]
    claimed = (results.get("winner") or {}).get("arm")
    if verdict.ranked and claimed not in (None, verdict.ranked[0].arm):
        parts.append(
            paragraph(f"Warning: results.json names {claimed} as winner, which its own runs contradict.", "warning")
        )
    if verdict.ranked:
        parts.append(paragraph(_lead(results, verdict), "lead"))
        missing = unranked(results, verdict)
        if missing:
            parts.append(
                paragraph(f"Not in this verdict, for lack of a finished run: {', '.join(missing)}.", "warning")
            )
        parts.append(
            f"<figure>{responsive(partial(charts.forest, verdict, looks, _zlib(results), common_decimals(results)))}"
        )
        parts.append("<figcaption>Small dots are seeds, marks are means, bars are one standard deviation.")
        parts.append(f"{escape(_zlib_note(results))}</figcaption></figure>")
        parts.append(_other_budgets(results, verdict))
        if verdict.comparisons:
            parts.append(
                details(
                    "The rule, and the numbers it was applied to",
                    paragraph(RULE) + _rule_table(verdict, looks),
                )
            )
    return f'<section id="result">{"".join(parts)}</section>'


def _lead(results: Mapping, verdict: Verdict) -> str:
    several = len(results["sizes"]) > 1
    text = f"Every run had a budget of {budget_text(verdict.budget)} of training"
    text += ", and each arm stands at its best size." if several else "."
    reference = next((cell for cell in verdict.ranked if cell.arm == results.get("reference")), None)
    best = verdict.ranked[0]
    if reference is not None and reference is not best and len(verdict.ranked) > 2:
        found = compare(best, reference)
        said = {True: "more than seed noise", False: "within seed noise", None: "the spread being unknown"}
        title, other = (title_of(results, cell.arm) for cell in (best, reference))
        gap = f"{found.difference:.3f} bits per byte ({percent(found.difference / reference.mean)})"
        text += f" {title} lies {gap} below the reference, {other}: {said[found.separable]}."
    return text


def _other_budgets(results: Mapping, verdict: Verdict) -> str:
    others = [judge(results, budget) for budget in results["budgets"] if float(budget) != verdict.budget]
    items = "".join(
        f"<li><b>{escape(budget_text(other.budget))}.</b> {escape(headline(results, other))}</li>" for other in others
    )
    return f"<p>At the other budgets:</p><ul class='budgets'>{items}</ul>" if items else ""


def _rule_table(verdict: Verdict, looks: Mapping[str, Look]) -> str:
    said = {True: "separable", False: "not separable", None: "spread unknown"}
    best = verdict.ranked[0]
    rows = [
        [
            looks[best.arm].title,
            best.size,
            mean_and_spread(best.mean, best.std),
            str(len(best.runs)),
            "",
            "",
            "",
            "",
        ]
    ]
    for found in verdict.comparisons:
        cell, error = found.other, found.standard_error
        in_errors = significant(found.difference / error) if error else ""
        row = [looks[cell.arm].title, cell.size, mean_and_spread(cell.mean, cell.std), str(len(cell.runs))]
        row += [signed(found.difference, 4), in_errors, significant(found.needed) if error and found.needed else ""]
        rows.append([*row, said[found.separable]])
    titles = [
        "Arm",
        "Size",
        "Bits/byte",
        "Seeds",
        "Above the best",
        "In standard errors",
        "t asked for",
        "Verdict",
    ]
    return plain_table(titles, rows)


def arms(results: Mapping, verdict: Verdict, looks: Mapping[str, Look]) -> str:
    """The tables of arms, the headline's budget first, a block for every size; and the runs that failed."""
    titles = {column: title for column, title in column_titles(results).items() if column not in ("budget", "size")}
    head = "".join(f'<th scope="col"{_numeric(column)}>{escape(title)}</th>' for column, title in titles.items())
    groups: dict[float, dict[str, list[Row]]] = {}
    for row in arm_rows(results):
        groups.setdefault(row.cell.budget, {}).setdefault(row.cell.size, []).append(row)
    tables = {}
    for budget, sizes in groups.items():
        body = "".join(_arm_block(size, rows, list(titles), looks, len(sizes) > 1) for size, rows in sizes.items())
        tables[budget] = scrolling(f'<table class="sortable"><thead><tr>{head}</tr></thead>{body}</table>')
    shown = tables.pop(verdict.budget, paragraph("No run was planned.", "quiet"))
    note = (
        "Bits per byte on the validation text: mean ± standard deviation over seeds; bold is the lowest mean at equal "
        "size and budget. Active parameters and FLOPs per token (forward and backward) are what was really used."
    )
    folded = "".join(details(f"The same at {budget_text(budget)}", table) for budget, table in tables.items())
    return shown + paragraph(note, "quiet") + folded + _lost_runs(results)


def _arm_block(size: str, rows: list[Row], columns: list[str], looks: Mapping[str, Look], named: bool) -> str:
    label = f'<tr class="group"><td colspan="{len(columns)}">Size {escape(size)}</td></tr>' if named else ""
    return f"<tbody>{label}{''.join(_arm_row(row, columns, looks) for row in rows)}</tbody>"


def _numeric(column: str) -> str:
    return "" if column == "arm" else ' class="number"'


def _arm_row(row: Row, columns: list[str], looks: Mapping[str, Look]) -> str:
    css = "lowest" if row.lowest else "lost" if not row.cell.runs else ""
    parts = [f'<tr class="{css}"><th scope="row">{looks[row.cell.arm].name()}</th>']
    for column in columns[1:]:
        number = row.numbers.get(column)
        key = repr(number) if is_number(number) else ""
        parts.append(f'<td class="number" data-sort="{key}">{escape(row.texts[column])}</td>')
    return "".join(parts) + "</tr>"


def _lost_runs(results: Mapping) -> str:
    counts: dict[tuple[str, str], int] = {}
    for run in results["runs"]:
        if run.get("error"):
            key = (title_of(results, run["arm"]), str(run["error"]))
            counts[key] = counts.get(key, 0) + 1
    items = "".join(
        f"<li>{escape(title)}, {count} run{'s' if count > 1 else ''}: {escape(error)}</li>"
        for (title, error), count in counts.items()
    )
    return f'<p>Runs that failed:</p><ul class="failed">{items}</ul>' if items else ""


def curves(results: Mapping, verdict: Verdict, looks: Mapping[str, Look]) -> str:
    if not verdict.ranked:
        return paragraph("No finished run, no curve.", "quiet")
    panels = {}
    for kind, log, label in (
        ("validation", True, "validation, log FLOPs"),
        ("validation", False, "validation, linear FLOPs"),
        ("training", True, "training, log FLOPs"),
        ("training", False, "training, linear FLOPs"),
    ):
        found = _arm_curves(verdict.ranked, kind)
        if found:
            reference = _zlib(results) if kind == "validation" else None
            panels[label] = responsive(partial(loss_curves, found, looks, kind, log, reference))
    if not panels:
        return paragraph("No curve was recorded.", "quiet")
    best_sizes = ", each arm at its best size" if len(results["sizes"]) > 1 else ""
    note = (
        f"Runs with a budget of {budget_text(verdict.budget)}{best_sizes}. Lines are means, bands reach "
        "from the lowest to the highest seed. Useful FLOPs, forward and backward. The steep start may leave the frame. "
        "Training losses are averaged in bins; they are in nats per token and depend on the tokenizer."
    )
    if _ends_differ(verdict):
        note += (
            " Along a run another amount of validation text is scored than at its end: the table may differ a little."
        )
    chart = f"<figure>{tabs('curves', panels)}<figcaption>{escape(note)}</figcaption></figure>"
    return chart + _all_curves(results, looks)


def _ends_differ(verdict: Verdict) -> bool:
    ends = [
        (run["curve"][-1]["bpb"], run["final"]["bpb"]) for c in verdict.ranked for run in c.runs if run.get("curve")
    ]
    return any(is_number(last) and abs(last - final) > 1e-6 for last, final in ends)


def _arm_curves(chosen: tuple[Cell, ...] | list[Cell], kind: str) -> dict:
    curves = {cell.arm: cell_curve(cell, kind) for cell in chosen}
    return {arm: curve for arm, curve in curves.items() if curve is not None}


def _captioned(chart: str, caption: str) -> str:
    return f"<figure><figcaption><strong>{escape(caption)}</strong></figcaption>{chart}</figure>"


def _all_curves(results: Mapping, looks: Mapping[str, Look]) -> str:
    groups: dict[tuple[float, str], list[Cell]] = {}
    for cell in cells(results):
        groups.setdefault((cell.budget, cell.size), []).append(cell)
    figures = []
    for (budget, size), group in groups.items():
        found = _arm_curves(group, "validation")
        if found:
            chart = loss_curves(found, looks, "validation", True, _zlib(results), 320)
            figures.append(_captioned(chart, f"{size}, {budget_text(budget)}"))
    if len(figures) < 2:
        return ""
    return details("Every size and budget", f'<div class="grid">{"".join(figures)}</div>')


def isoflop(results: Mapping, looks: Mapping[str, Look]) -> str:
    stored = results.get("isoflop") or {}
    panels = {
        float(budget): {arm: entry for arm, entry in arms.items() if any(is_number(p[1]) for p in entry["points"])}
        for budget, arms in stored.items()
    }
    panels = {budget: arms for budget, arms in sorted(panels.items()) if arms}
    if not panels:
        return paragraph("No isoFLOP points were recorded.", "quiet")
    if not any(len({p[0] for p in entry["points"]}) > 1 for arms in panels.values() for entry in arms.values()):
        return paragraph("Every arm ran at one size only, so this comparison cannot say. Three sizes or more can.")
    zlib = _zlib(results)
    active = [p[0] for arms in panels.values() for entry in arms.values() for p in entry["points"] if is_number(p[1])]
    sizes = padded(active, 0.08, log=True)
    figures = [
        _captioned(charts.isoflop(arms, looks, sizes, zlib, 460), budget_text(budget))
        for budget, arms in panels.items()
    ]
    rows = [
        [budget_text(budget), looks[arm].title, charts.minimum_text(entry)]
        for budget, arms in panels.items()
        for arm, entry in arms.items()
    ]
    note = (
        "Each panel is one budget, with its own vertical scale: a smaller model sees more tokens, a larger one fewer. "
        "Bars are one standard deviation. Where three sizes or more were measured, a parabola in the logarithm of the "
        "active parameters is fitted to the means; a ring marks its minimum only if the parabola opens upwards and the "
        "minimum lies between the measured sizes."
    )
    table = plain_table(["Budget", "Arm", "Fitted minimum"], rows, n_text=3)
    return f'<div class="grid two">{"".join(figures)}</div>' + paragraph(note, "quiet") + details("The fits", table)

"""The sections of the report, from the sentence at its top to the pictures of experts and tokens."""

from collections.abc import Mapping
from functools import partial

from moestro.compare import charts
from moestro.compare.curves import cell_curve, loss_curves
from moestro.compare.looks import Look
from moestro.compare.markup import details, paragraph, plain_table, scrolling, tabs
from moestro.compare.numerals import is_number, mean_and_spread, percent, signed, significant
from moestro.compare.plots import escape, responsive
from moestro.compare.provenance import arms_table, corpus_facts, counting, runs_table
from moestro.compare.table import arm_rows, column_titles
from moestro.compare.token_text import coloured_text
from moestro.compare.usage import layer_figure, share_rows
from moestro.compare.verdict import RULE, Cell, Verdict, budget_text, cells, compare, headline, judge

# More layers than this are folded away behind the first ones.
SHOWN_LAYERS = 6


def _zlib(results: Mapping) -> float | None:
    value = (results.get("corpus") or {}).get("zlib_bpb")
    return value if is_number(value) else None


def _zlib_note(results: Mapping) -> str:
    zlib = _zlib(results)
    if zlib is None:
        return ""
    return f" zlib reaches {zlib:.3f} bits per byte on the same corpus; its line is drawn where it is near enough."


def result(results: Mapping, verdict: Verdict, looks: Mapping[str, Look]) -> str:
    parts = [f"<h1>{escape(headline(results, verdict))}</h1>"]
    claimed = (results.get("winner") or {}).get("arm")
    if verdict.ranked and claimed not in (None, verdict.ranked[0].arm):
        parts.append(
            paragraph(f"Warning: results.json names {claimed} as winner, which its own runs contradict.", "warning")
        )
    if verdict.ranked:
        parts.append(paragraph(_lead(results, verdict), "lead"))
        parts.append(f"<figure>{responsive(partial(charts.forest, verdict, looks, _zlib(results)))}")
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
        gap = f"{signed(-found.difference)} bits per byte, {percent(found.difference / reference.mean)}"
        text += f" Against the reference, {other}, {title} makes a difference of {gap}: {said[found.separable]}."
    return text


def title_of(results: Mapping, arm: str) -> str:
    """The arm's title as the recipe gives it."""
    return str(results["arms"][arm].get("title") or arm)


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


def arms(results: Mapping, looks: Mapping[str, Look]) -> str:
    titles = column_titles(results)
    words = ("arm", "size")
    head = "".join(
        f'<th scope="col" class="{"" if column in words else "number"}">{escape(title)}</th>'
        for column, title in titles.items()
    )
    body, group = [], None
    for row in arm_rows(results):
        here = (row.cell.budget, row.cell.size)
        css = ("lowest " if row.lowest else "") + ("lost " if not row.cell.runs else "")
        css += "first" if group not in (None, here) else ""
        group = here
        first = f'<th scope="row" data-sort="{escape(row.texts["arm"])}">{looks[row.cell.arm].name()}</th>'
        body.append(f'<tr class="{css.strip()}">{first}')
        for column in list(titles)[1:]:
            number = row.numbers.get(column)
            key = f' data-sort="{number!r}"' if is_number(number) else ' data-sort=""' if column not in words else ""
            body.append(f'<td class="{"" if column in words else "number"}"{key}>{escape(row.texts[column])}</td>')
        body.append("</tr>")
    table = f'<table class="sortable"><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table>'
    note = (
        "Bits per byte on the validation text: mean ± standard deviation over seeds; bold is the lowest mean at equal "
        "size and budget. Active parameters and FLOPs per token (forward) are means of what was really used."
    )
    return scrolling(table) + paragraph(note, "quiet") + _lost_runs(results)


def _lost_runs(results: Mapping) -> str:
    errors = [
        f"{title_of(results, run['arm'])}, {run['size']}, seed {run.get('seed')}: {run['error']}"
        for run in results["runs"]
        if run.get("error")
    ]
    items = "".join(f"<li>{escape(error)}</li>" for error in errors)
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
    note = (
        f"Runs with a budget of {budget_text(verdict.budget)}, each arm at its best size. Lines are means, bands reach "
        "from the lowest to the highest seed. Useful FLOPs, forward and backward. The steep start may leave the frame. "
        "Training losses are averaged in bins; they are in nats per token and depend on the tokenizer."
    )
    chart = f"<figure>{tabs('curves', panels)}<figcaption>{escape(note)}</figcaption></figure>"
    return chart + _all_curves(results, looks)


def _arm_curves(chosen: tuple[Cell, ...] | list[Cell], kind: str) -> dict:
    curves = {cell.arm: cell_curve(cell, kind) for cell in chosen}
    return {arm: curve for arm, curve in curves.items() if curve is not None}


def _captioned(chart: str, caption: str) -> str:
    return f"<figure>{chart}<figcaption>{escape(caption)}</figcaption></figure>"


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
    zlib = _zlib(results)
    domain = charts.isoflop_domain(panels, zlib)
    figures = [
        _captioned(charts.isoflop(arms, looks, domain, zlib, 460), budget_text(budget))
        for budget, arms in panels.items()
    ]
    rows = [
        [budget_text(budget), looks[arm].title, charts.minimum_text(entry)]
        for budget, arms in panels.items()
        for arm, entry in arms.items()
    ]
    note = (
        "Each panel is one budget: a smaller model sees more tokens, a larger one fewer. Bars are one standard "
        "deviation. Where three sizes or more were measured, a parabola in the logarithm of the active parameters is "
        "fitted to the means; a ring marks its minimum only if the parabola opens upwards and the minimum lies between "
        "the measured sizes."
    )
    table = plain_table(["Budget", "Arm", "Fitted minimum"], rows, n_text=3)
    return f'<div class="grid two">{"".join(figures)}</div>' + paragraph(note, "quiet") + details("The fits", table)


def usage(verdict: Verdict, looks: Mapping[str, Look]) -> str:
    blocks = []
    for cell in verdict.ranked:
        run = next((run for run in cell.runs if run.get("routing")), None)
        if run is not None:
            blocks.append(_arm_usage(run, looks[cell.arm]))
    if not blocks:
        return paragraph("No arm with experts has finished.", "quiet")
    note = (
        "Few experts: one bar each, ordered by width. A bar is as wide as its expert and as high as its share of the "
        "routed tokens, so its area is work; the ribbons lead to the share of work itself. The dashed line is an even "
        "share. Many experts: how many of them received how many tokens. Unevenness is ln N minus the entropy of the "
        "summed gates: 0 where all experts get the same, ln N where one gets everything."
    )
    return paragraph(note, "quiet") + "".join(blocks)


def _arm_usage(run: Mapping, look: Look) -> str:
    figures = [layer_figure(name, layer, look) for name, layer in run["routing"].items()]
    shown, folded = figures[:SHOWN_LAYERS], figures[SHOWN_LAYERS:]
    rows = [row for name, layer in run["routing"].items() for row in share_rows(name, layer)]
    body = f'<div class="grid">{"".join(shown)}</div>'
    if folded:
        body += details(f"{len(folded)} more layers", f'<div class="grid">{"".join(folded)}</div>')
    if rows:
        titles = ["Layer", "Expert", "Width", "Share of width", "Share of tokens", "Share of work"]
        body += details("Numbers", plain_table(titles, rows))
    where = f"size {run['size']}, seed {run.get('seed')}"
    return f'<div class="arm-block"><h3>{look.name()} <small>{escape(where)}</small></h3>{body}</div>'


def sample(results: Mapping, looks: Mapping[str, Look]) -> str:
    samples = results.get("sample") or {}
    panels = {
        look.name(): coloured_text(samples.get(arm) or [], look, f"sample-{i}")
        for i, (arm, look) in enumerate(looks.items())
    }
    if not any(samples.get(arm) for arm in looks):
        return paragraph("No sample text was recorded.", "quiet")
    note = (
        "The stronger the colour, the more of the layer worked on that token. Point at a token for its loss and its "
        "figures in every layer. Scales are those of the arm and the layer shown."
    )
    return paragraph(note, "quiet") + tabs("sample", panels)


def setup(results: Mapping, verdict: Verdict, looks: Mapping[str, Look]) -> str:
    return (
        corpus_facts(results)
        + "<h3>Arms</h3>"
        + arms_table(results, looks)
        + "<h3>How compute is counted</h3>"
        + counting(results, verdict)
        + runs_table(results)
    )

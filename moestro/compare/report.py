"""report.html: one self-contained page that says which arm won at equal compute, and shows why one may believe it."""

import os
from collections.abc import Mapping
from pathlib import Path

from moestro.compare import sections
from moestro.compare.looks import Look, arm_looks
from moestro.compare.markup import section, tab_rules
from moestro.compare.page import html_page, write_page
from moestro.compare.provenance import limits, setup_section
from moestro.compare.token_text import sample_section, view_rules, views
from moestro.compare.usage import usage_section
from moestro.compare.verdict import main_verdict

MENU = {
    "arms": "Arms",
    "curves": "Curves",
    "isoflop": "isoFLOP",
    "experts": "Experts",
    "sample": "Sample",
    "setup": "Setup",
    "limits": "Limits",
}


def render_report(results: Mapping) -> str:
    """The whole page as HTML: style, script and drawings inside, nothing fetched.

    Raises: ValueError where `results` is no results.json of the version written here.
    """
    verdict, looks = main_verdict(results), arm_looks(results)
    body = "".join(
        [
            sections.result(results, verdict, looks),
            section("arms", "All arms", sections.arms(results, verdict, looks)),
            section("curves", "Loss against compute", sections.curves(results, verdict, looks)),
            section("isoflop", "How large should the model be?", sections.isoflop(results, looks)),
            section("experts", "Which experts worked", usage_section(verdict, looks)),
            section("sample", "The same text, seen by every arm", sample_section(results, looks)),
            section("setup", "How this was measured", setup_section(results, verdict, looks)),
            section("limits", "What this does not show", limits(results, verdict)),
        ]
    )
    n_views = max((len(views(tokens)) for tokens in (results.get("sample") or {}).values()), default=0)
    rules = tab_rules(max(len(results["arms"]), len(results["sizes"]) * len(results["budgets"]), 4)) + view_rules(
        n_views
    )
    title = results.get("title") or "moestro compare"
    return html_page("compare", title, MENU, body, rules, _legend(looks) if len(looks) > 1 else "")


def write_report(results: Mapping, path: str | os.PathLike) -> Path:
    """Renders the page and puts it at `path` in one step: readers see the old page or the new one, never half."""
    return write_page(render_report(results), path)


def _legend(looks: Mapping[str, Look]) -> str:
    chips = "".join(
        f'<label class="chip"><input type="checkbox" checked data-arm="{look.css.split()[-1]}">{look.name()}</label>'
        for look in looks.values()
    )
    return f'<div class="chips" aria-label="arms shown in the charts">{chips}</div>'

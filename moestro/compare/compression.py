"""The page of `moestro compress`: what a smaller checkpoint costs, and which experts are left."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moestro.compare.markup import facts, paragraph, plain_table, section
from moestro.compare.numerals import percent, significant
from moestro.compare.page import html_page, write_page
from moestro.compare.plots import escape

MENU = {"result": "Before and after", "layers": "Layers", "setup": "Setup"}


def render_compression(found: Mapping[str, Any], figures: Sequence[Sequence[str]]) -> str:
    """The whole page as HTML, from a report and its rows of figures: nothing is fetched."""
    title = f"{found['source']}: {found['method']}, ratio {found['ratio']:g}"
    result = plain_table(["", "before", "after"], [list(row) for row in figures])
    said = paragraph(found["decode_speed"]) if found["decode_speed"] else ""
    warned = "".join(paragraph(line, "warning") for line in found["warnings"])
    body = f"<h1>{escape(title)}</h1>"
    body += section("result", "Before and after", result + said + warned)
    body += section("layers", "Which experts are left", _layers(found["layers"]))
    body += section("setup", "How it was made", _setup(found))
    return html_page("compress", title, MENU, body)


def _layers(layers: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for layer in layers:
        total, left = layer["experts"]
        scores = next(iter(layer["scores"].items()), None)
        low = "" if scores is None else f"{scores[0]} {significant(min(scores[1][e] for e in layer['retained']))}"
        seen = "" if layer["coverage"] is None else percent(min(layer["coverage"]), 2)
        entropy = "" if layer["entropy"] is None else f"{layer['entropy']:.3f}"
        kept = ", ".join(map(str, layer["retained"]))
        rows.append([f"{layer['layer']}", kept, f"{left} of {total}", low, seen, entropy])
    titles = ["Layer", "Kept", "Experts", "Lowest score kept", "Least share of rows", "Router entropy, nats"]
    return plain_table(titles, rows, n_text=2)


def _setup(found: Mapping[str, Any]) -> str:
    text, machine = found["calibration"], found["after"].get("machine")
    return facts(
        {
            "Method": found["method"],
            "Semantics": found["semantics"],
            "Quantised": found["quantise"] or "no",
            "Calibration": f"{text['tokens']:,} tokens of {text['text']}" if text else "none",
            "Calibration, SHA-256": text["sha256"] if text else "none",
            "Seed": f"{found['seed']}",
            "Loaded as": found["after"].get("load_check", "not loaded"),
            "Machine": machine["cpu"] if machine else "nothing was measured",
        }
    )


def write_compression(found: Mapping[str, Any], figures: Sequence[Sequence[str]], path: str | os.PathLike[str]) -> Path:
    """The page at `path`, in one step."""
    return write_page(render_compression(found, figures), path)

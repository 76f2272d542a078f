"""Quality against active parameters as a knob is turned without training."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from moestro.compare.charts import tick_decimals
from moestro.compare.looks import Look
from moestro.compare.markup import details, paragraph, plain_table, tabs
from moestro.compare.numerals import scientific, si, significant
from moestro.compare.plots import PHONE, Axis, axes, line, marker, padded, responsive, svg, text

KNOB_TITLES = {"threshold": "top-p threshold p", "top_k": "experts per token k"}


def knob_section(found: Mapping[str, Any], run: Look) -> str:
    """A chart and a table for each knob the model has."""
    if not found["curves"]:
        return paragraph("This model's routers have neither a threshold nor a k that could be turned.", "quiet")
    note = (
        "The same weights, with the number of experts a token gets changed in every layer at once. Quality and cost "
        "are measured on the same text; the ring is the present setting."
    )
    panels = {KNOB_TITLES[knob]: _panel(knob, curve, run) for knob, curve in found["curves"].items()}
    return paragraph(note, "quiet") + tabs("knobs", panels)


def _panel(knob: str, curve: Mapping[str, Any], run: Look) -> str:
    chart = f"<figure>{responsive(partial(knob_chart, knob, curve, run))}</figure>"
    titles = [KNOB_TITLES[knob], "Bits/byte", "Experts a layer", "Active width", "Active parameters", "FLOPs a token"]
    rows = [
        [
            f"{point['value']:g}{' (now)' if point['value'] == curve['now'] else ''}",
            f"{point['bpb']:.4f}",
            significant(point["experts"]),
            significant(point["active_width"], 4),
            si(point["params_active"], 4),
            scientific(point["flops"]),
        ]
        for point in curve["points"]
    ]
    return chart + details("Numbers", plain_table(titles, rows))


def knob_chart(knob: str, curve: Mapping[str, Any], run: Look, width: float) -> str:
    """Bits per byte against active parameters; every mark is named by its setting, the present one has a ring."""
    phone = width < PHONE
    points = sorted(curve["points"], key=lambda point: point["params_active"])
    xs, ys = [point["params_active"] for point in points], [point["bpb"] for point in points]
    height = 300 if phone else 380
    x = Axis(*padded(xs, 0.05), 52, width - 22)
    y = Axis(*padded(ys, 0.1), height - 44, 26)
    decimals = max(2, tick_decimals(y.low, y.high))
    parts = [
        axes(x, y, "active parameters a token", "bits per byte", partial(si, digits=4), lambda v: f"{v:.{decimals}f}")
    ]
    drawn = line(x, y, xs, ys)
    symbol = "p" if knob == "threshold" else "k"
    for point in points:
        px, py = x.at(point["params_active"]), y.at(point["bpb"])
        tip = (
            f"{symbol} = {point['value']:g}: {point['bpb']:.4f} bits per byte, {significant(point['experts'])} experts "
            f"a layer, {si(point['params_active'], 4)} active parameters"
        )
        drawn += marker(run.shape, px, py, 4, "mark", tip)
        if point["value"] == curve["now"]:
            drawn += marker(run.shape, px, py, 8, "ring", tip)
    parts.append(f'<g class="{run.css}">{drawn}</g>')
    parts.append(_labels(points, x, y, symbol, 34 if phone else 44))
    return svg(width, height, "".join(parts), f"Bits per byte against active parameters as {symbol} moves")


def _labels(points: list[Mapping[str, Any]], x: Axis, y: Axis, symbol: str, gap: float) -> str:
    """The settings beside their marks, where the line leaves room; left out where they would lie on the one before."""
    parts, last = [], (float("-inf"), 0.0)
    for point, following in zip(points, [*points[1:], points[-1]], strict=True):
        px, py = x.at(point["params_active"]), y.at(point["bpb"])
        if px - last[0] < gap and abs(py - last[1]) < 16:
            continue
        last = (px, py)
        below = following["bpb"] > point["bpb"]
        label = f"{symbol} {point['value']:g}"
        parts.append(text(px, py + 20, label, "note", "middle") if below else text(px + 7, py - 8, label, "note"))
    return "".join(parts)

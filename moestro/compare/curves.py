"""Loss curves: the mean over seeds and the band between the lowest and the highest one, against FLOPs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moestro.compare.charts import level, reach, tick_decimals, with_level
from moestro.compare.looks import Look
from moestro.compare.numerals import is_number, scientific
from moestro.compare.plots import (
    PHONE,
    Axis,
    axes,
    band,
    clipped,
    line,
    marker,
    padded,
    segment,
    shorten,
    spread_out,
    svg,
    text,
)
from moestro.compare.verdict import Cell

# Training losses are noisy and long: they are averaged within this many equal ratios of FLOPs.
N_BINS = 80


@dataclass(frozen=True)
class Curve:
    """Mean, lowest and highest value over seeds at the same FLOPs."""

    xs: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    n_seeds: int


def finite(points: Sequence[Mapping], field: str) -> list[tuple[float, float]]:
    """(FLOPs, value) of the records that have both, in order of FLOPs; FLOPs of zero have no logarithm."""
    pairs = [(point.get("flops"), point.get(field)) for point in points]
    return sorted((x, y) for x, y in pairs if is_number(x) and is_number(y) and x > 0)


def binned(points: list[tuple[float, float]], n_bins: int = N_BINS) -> list[tuple[float, float]]:
    """Means of neighbouring points, at most `n_bins` of them, evenly spaced in log FLOPs."""
    if len(points) <= n_bins:
        return points
    xs, ys = (np.array(column) for column in zip(*points, strict=True))
    edges = np.geomspace(xs[0], xs[-1], n_bins + 1)
    which = np.clip(np.digitize(xs, edges) - 1, 0, n_bins - 1)
    return [(float(xs[which == i].mean()), float(ys[which == i].mean())) for i in np.unique(which)]


def over_seeds(curves: Sequence[list[tuple[float, float]]]) -> Curve | None:
    """Mean, lowest and highest of several curves on the FLOPs that all of them cover (linear between points)."""
    curves = [curve for curve in curves if curve]
    if not curves:
        return None
    first, last = max(c[0][0] for c in curves), min(c[-1][0] for c in curves)
    if first > last:
        return None
    grid = np.array(sorted({first, last, *(x for x, _ in curves[0] if first <= x <= last)}))
    rows = np.array([np.interp(grid, [x for x, _ in curve], [y for _, y in curve]) for curve in curves])
    xs, mean, low, high = (tuple(column.tolist()) for column in (grid, rows.mean(0), rows.min(0), rows.max(0)))
    return Curve(xs, mean, low, high, len(curves))


def cell_curve(cell: Cell, kind: str) -> Curve | None:
    """`validation` (bits per byte) or `training` (nats per token, averaged in bins) of one cell."""
    if kind == "validation":
        return over_seeds([finite(run.get("curve") or [], "bpb") for run in cell.runs])
    return over_seeds([binned(finite(run.get("train_curve") or [], "loss")) for run in cell.runs])


def y_domain(curves: Sequence[Curve], reference: float | None) -> tuple[float, float]:
    """Everything from 12 % of the longest run on: the fall from chance would flatten all that tells arms apart."""
    begin = 0.12 * max(curve.xs[-1] for curve in curves)
    values = [
        v
        for curve in curves
        for x, low, high in zip(curve.xs, curve.low, curve.high, strict=True)
        if x >= begin
        for v in (low, high)
    ]
    return reach(*padded(values, 0.06), reference, 0.35)


def loss_curves(
    curves: Mapping[str, Curve],
    looks: Mapping[str, Look],
    kind: str,
    log: bool,
    reference: float | None,
    width: float,
) -> str:
    """All arms on common axes; where there is room every curve carries its arm's name at its end."""
    phone, small = width < PHONE, width < 330
    height = 250 if small else 330 if phone else 420
    ends = [curve.xs[-1] for curve in curves.values()]
    starts = [curve.xs[0] for curve in curves.values()]
    x_low, x_high = (max(min(starts), 0.05 * max(ends)), max(ends)) if log else (0.0, max(ends))
    if log and x_low >= x_high:
        x_low, x_high = padded([x_high], log=True)
    y_low, y_high = y_domain(list(curves.values()), reference)
    x = Axis(x_low, x_high, 50, width - (12 if phone else 160), log)
    y = Axis(y_low, y_high, height - 46, 30)
    decimals = tick_decimals(y_low, y_high)
    y_label = "validation bits per byte" if kind == "validation" else "training loss, nats per token"
    title = with_level(y_label, y, reference, "zlib")
    parts = [axes(x, y, "useful training FLOPs", title, scientific, lambda v: f"{v:.{decimals}f}")]
    parts.append(level(x, y, reference, "zlib"))
    drawn = "".join(_one_curve(curve, looks[arm], x, y, kind) for arm, curve in curves.items())
    parts.append(clipped(x, y, drawn))
    if not phone:
        parts.append(_end_labels(curves, looks, x, y))
    return svg(width, height, "".join(parts), f"{y_label} against useful training FLOPs")


def _one_curve(curve: Curve, look: Look, x: Axis, y: Axis, kind: str) -> str:
    body = band(x, y, curve.xs, curve.low, curve.high) if curve.n_seeds > 1 else ""
    body += line(x, y, curve.xs, curve.mean)
    if kind == "validation":
        for flops, mean, low, high in zip(curve.xs, curve.mean, curve.low, curve.high, strict=True):
            seeds = f", seeds {low:.3f} to {high:.3f}" if curve.n_seeds > 1 else ""
            tip = f"{look.title}: {mean:.3f} at {scientific(flops)} FLOPs{seeds}"
            body += marker(look.shape, x.at(flops), y.at(mean), 2.6, "mark", tip)
    return f'<g class="{look.css}">{body}</g>'


def _end_labels(curves: Mapping[str, Curve], looks: Mapping[str, Look], x: Axis, y: Axis) -> str:
    arms = list(curves)
    wanted = [min(max(y.at(curves[arm].mean[-1]), y.end), y.start) for arm in arms]
    placed = spread_out(wanted, 17, y.end, y.start)
    parts = []
    for arm, target, at in zip(arms, wanted, placed, strict=True):
        stroke = segment(x.at(curves[arm].xs[-1]) + 3, target, x.end + 14, at, "leader")
        name = text(x.end + 18, at + 4, shorten(looks[arm].title, 20), "name end")
        parts.append(f'<g class="{looks[arm].css}">{stroke}{name}</g>')
    return "".join(parts)

"""The charts of final results: every seed of every arm, and bits per byte against active parameters."""

from collections.abc import Mapping, Sequence
from functools import partial

from moestro.compare.isoflop import minimum_status, parabola
from moestro.compare.looks import Look
from moestro.compare.numerals import is_number, mean_and_spread, si
from moestro.compare.plots import (
    PHONE,
    Axis,
    axes,
    bar,
    line,
    marker,
    nice_ticks,
    padded,
    segment,
    shorten,
    svg,
    text,
)
from moestro.compare.verdict import Cell, Verdict


def reach(low: float, high: float, reference: float | None, share: float = 0.6) -> tuple[float, float]:
    """[low, high] widened to hold `reference` where that costs at most `share` of the range; else unchanged."""
    room = share * (high - low)
    if not is_number(reference) or not low - room <= reference <= high + room:
        return low, high
    return min(low, reference - 0.04 * (high - low)), max(high, reference + 0.04 * (high - low))


def level(x: Axis, y: Axis, value: float | None, name: str) -> str:
    """A dashed horizontal line at a reference value, named at its left end; nothing where it is off the axis."""
    if not is_number(value) or not y.low <= value <= y.high:
        return ""
    at = y.at(value)
    return segment(x.start, at, x.end, at, "reference") + text(x.start + 6, at - 5, f"{name} {value:.3f}", "note")


def with_level(label: str, y: Axis, value: float | None, name: str) -> str:
    """The axis title, saying where the reference value lies if that is off the axis."""
    if not is_number(value) or y.low <= value <= y.high:
        return label
    return f"{label} ({name}, {value:.3f}, lies {'below' if value < y.low else 'above'})"


def tick_decimals(low: float, high: float, count: int = 5) -> int:
    """Decimals that tell neighbouring ticks of a linear axis apart."""
    ticks = nice_ticks(low, high, count)
    return next((d for d in range(6) if all(abs(round(t, d) - t) < 1e-9 for t in ticks)), 6)


def forest(verdict: Verdict, looks: Mapping[str, Look], zlib_bpb: float | None, decimals: int, width: float) -> str:
    """One row an arm, lowest first: a dot for every seed, the mean, and a bar of one standard deviation."""
    phone = width < PHONE
    row = 46 if phone else 32
    left, right, top = (10, width - 10, 8) if phone else (210, width - 150, 8)
    bottom = top + row * len(verdict.ranked)
    reached = [v for cell in verdict.ranked for v in (*cell.bpb, *_whiskers(cell.mean, cell.std))]
    low, high = reach(*padded(reached, 0.08), zlib_bpb)
    x = Axis(low, high, left, right)
    parts = [_forest_grid(x, top, bottom)]
    if is_number(zlib_bpb) and low <= zlib_bpb <= high:
        at = x.at(zlib_bpb)
        side = "end" if at > (left + right) / 2 else "start"
        parts.append(segment(at, top, at, bottom, "reference"))
        parts.append(text(at + (-5 if side == "end" else 5), bottom - 5, f"zlib {zlib_bpb:.3f}", "note", side))
    for i, cell in enumerate(verdict.ranked):
        look = looks[cell.arm]
        y = top + row * (i + 0.5) + (9 if phone else 0)
        parts.append(f'<g class="{look.css}">{_forest_row(cell, look, x, y)}</g>')
        measured = mean_and_spread(cell.mean, cell.std, decimals)
        if phone:
            parts.append(text(left, y - 13, shorten(look.title, 28), "name"))
            parts.append(text(right, y - 13, measured, "value", "end"))
        else:
            parts.append(text(left - 16, y + 4, shorten(look.title, 28), "name", "end"))
            parts.append(text(width - 4, y + 4, measured, "value", "end"))
    parts.append(text(x.end, bottom + 36, "validation bits per byte, lower is better", "label", "end"))
    summary = ", ".join(f"{looks[c.arm].title} {mean_and_spread(c.mean, c.std)}" for c in verdict.ranked)
    return svg(width, bottom + 44, "".join(parts), f"Validation bits per byte by arm: {summary}")


def _whiskers(mean: float, std: float | None) -> tuple[float, float]:
    return (mean - (std or 0.0), mean + (std or 0.0))


def _forest_grid(x: Axis, top: float, bottom: float) -> str:
    count = max(2, round((x.end - x.start) / 100))
    decimals = tick_decimals(x.low, x.high, count)
    parts = [segment(x.start, bottom, x.end, bottom, "axis")]
    for value in x.ticks(count):
        parts.append(segment(x.at(value), top, x.at(value), bottom, "grid"))
        parts.append(text(x.at(value), bottom + 17, f"{value:.{decimals}f}", "tick", "middle"))
    return "".join(parts)


def _forest_row(cell: Cell, look: Look, x: Axis, y: float) -> str:
    parts = []
    if cell.std is not None:
        low, high = _whiskers(cell.mean, cell.std)
        parts.append(bar(x.at(low), y - 5, max(x.at(high) - x.at(low), 1), 10, "spread"))
    for run in cell.runs:
        tip = f"{look.title}, {cell.size}, seed {run.get('seed')}: {run['final']['bpb']:.4f} bits per byte"
        parts.append(marker("circle", x.at(run["final"]["bpb"]), y, 3, "seed", tip))
    tip = f"{look.title}, {cell.size}: {mean_and_spread(cell.mean, cell.std)}, {len(cell.runs)} finished seed(s)"
    parts.append(marker(look.shape, x.at(cell.mean), y, 5.2, "mark", tip))
    return "".join(parts)


def isoflop_heights(arms: Mapping[str, Mapping], zlib_bpb: float | None) -> tuple[float, float]:
    """The range of bits per byte that holds every point and every marked minimum of one budget."""
    points = [p for entry in arms.values() for p in entry["points"] if is_number(p[1])]
    y_values = [v for p in points for v in _whiskers(p[1], p[2] if len(p) > 2 else None)]
    for entry in arms.values():
        if minimum_status(entry["points"], entry["fit"]) == "inside":
            y_values.append(entry["fit"]["minimum_bpb"])
    return reach(*padded(y_values, 0.1), zlib_bpb, 0.3)


def isoflop(
    arms: Mapping[str, Mapping],
    looks: Mapping[str, Look],
    sizes: tuple[float, float],
    zlib_bpb: float | None,
    width: float,
) -> str:
    """One budget: points with bars of one standard deviation, parabolas over the measured sizes, inner minima."""
    height = 340
    y_low, y_high = isoflop_heights(arms, zlib_bpb)
    x = Axis(*sizes, 52, width - 12, log=True)
    y = Axis(y_low, y_high, height - 48, 30)
    decimals = tick_decimals(y_low, y_high)
    title = with_level("validation bits per byte", y, zlib_bpb, "zlib")
    parts = [axes(x, y, "active parameters", title, partial(si, digits=4), lambda v: f"{v:.{decimals}f}")]
    parts.append(level(x, y, zlib_bpb, "zlib"))
    for arm, entry in arms.items():
        parts.append(f'<g class="{looks[arm].css}">{_isoflop_arm(entry, looks[arm], x, y)}</g>')
    return svg(width, height, "".join(parts), "Validation bits per byte against active parameters, one line an arm")


def _isoflop_arm(entry: Mapping, look: Look, x: Axis, y: Axis) -> str:
    points: Sequence = sorted(p for p in entry["points"] if is_number(p[1]))
    fit = entry["fit"]
    parts = []
    if fit is not None:
        low, high = points[0][0], points[-1][0]
        sizes = [low * (high / low) ** (i / 60) for i in range(61)]
        parts.append(line(x, y, sizes, [parabola(fit, n) for n in sizes], "line"))
    elif len(points) > 1:
        parts.append(line(x, y, [p[0] for p in points], [p[1] for p in points], "line faint"))
    if fit is not None and minimum_status(points, fit) == "inside":
        at = x.at(fit["minimum_params"])
        tip = f"{look.title}: fitted minimum {fit['minimum_bpb']:.3f} at {si(fit['minimum_params'])} active parameters"
        parts.append(segment(at, y.at(fit["minimum_bpb"]), at, y.start, "drop"))
        parts.append(marker("circle", at, y.at(fit["minimum_bpb"]), 7, "ring", tip))
    for size, mean, *rest in points:
        std = rest[0] if rest else None
        low, high = _whiskers(mean, std)
        parts.append(segment(x.at(size), y.at(low), x.at(size), y.at(high), "whisker"))
        tip = f"{look.title}, {si(size)} active: {mean_and_spread(mean, std)} bits per byte"
        parts.append(marker(look.shape, x.at(size), y.at(mean), 4.2, "mark", tip))
    return "".join(parts)


def minimum_text(entry: Mapping) -> str:
    """What the fit of one arm at one budget says, and what it does not."""
    points, fit = [p for p in entry["points"] if is_number(p[1])], entry["fit"]
    status = minimum_status(points, fit)
    if status == "unfitted":
        return f"{len({p[0] for p in points})} size(s): a parabola needs three"
    if status == "none":
        return "the fit does not bend upwards: no minimum"
    if status != "inside":
        where = {"below": "smaller than every measured size", "above": "larger than every measured size"}[status]
        return f"the minimum would be {where}: not marked"
    exact = " (three sizes: the parabola passes through them exactly)" if len({p[0] for p in points}) == 3 else ""
    return f"{fit['minimum_bpb']:.3f} at {si(fit['minimum_params'])} active parameters{exact}"

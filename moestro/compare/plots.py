"""Small SVG charts: axes with readable ticks, lines, bands, markers, bars. Pure functions from numbers to text."""

import html
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

Format = Callable[[float], str]
# Drawings narrower than this are for phones.
PHONE = 500
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "wedge")

# Control characters are not allowed in HTML; each has a picture of its own in Unicode.
_PICTURES = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n\r"} | {127: "\u2421"}


def escape(text: object) -> str:
    """`text` made harmless inside HTML elements and attributes, printable and encodable as UTF-8."""
    plain = str(text).translate(_PICTURES).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return html.escape(plain, quote=True)


def shorten(text: str, length: int) -> str:
    """`text`, cut to `length` characters with an ellipsis."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def coordinate(value: float) -> str:
    """A coordinate with at most one decimal: enough for the eye, short on the page."""
    return f"{value:.1f}".removesuffix(".0")


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (steps of 1, 2, 2.5 or 5 times a power of ten) in [low, high]."""
    if not high > low:
        return [low]
    rough = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) if abs(step) < 1 else i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers for a log axis: the coarsest of 1 | 1, 3 | 1, 2, 5 | 1, 1.5, 2, ... that gives three or more."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ladders = (
        (1,),
        (1, 3),
        (1, 2, 5),
        (1, 1.5, 2, 3, 4, 5, 7),
        (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9),
    )
    for ladder in ladders:
        inside = [m * 10.0**d for d in decades for m in ladder if low * 0.999 <= m * 10.0**d <= high * 1.001]
        if len(inside) >= 3:
            return inside[:: math.ceil(len(inside) / (2 * count))]
    return nice_ticks(low, high, count)


@dataclass(frozen=True)
class Axis:
    """Maps [low, high], linearly or by logarithm, onto pixels [start, end]."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        if self.log:
            return self.start + (self.end - self.start) * math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + (self.end - self.start) * (value - self.low) / (self.high - self.low)

    def ticks(self, count: int = 5) -> list[float]:
        return log_ticks(self.low, self.high, count) if self.log else nice_ticks(self.low, self.high, count)


def padded(values: Iterable[float], share: float = 0.06, log: bool = False) -> tuple[float, float]:
    """Lowest and highest of `values`, widened by `share` of their distance (and never equal)."""
    values = list(values)
    low, high = min(values), max(values)
    if log:
        low, high = math.log(low), math.log(high)
    margin = (high - low) * share or 0.05 * (abs(high) if not log else 1.0) or 1.0
    return (math.exp(low - margin), math.exp(high + margin)) if log else (low - margin, high + margin)


def text(x: float, y: float, content: str, css: str = "", anchor: str = "start") -> str:
    """One line of text; `content` is escaped here."""
    at = f'x="{coordinate(x)}" y="{coordinate(y)}"'
    return f'<text class="{css}" {at} text-anchor="{anchor}">{escape(content)}</text>'


def segment(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    """A straight stroke."""
    return polyline([(x1, y1), (x2, y2)], css)


def polyline(points: Iterable[tuple[float, float]], css: str, closed: bool = False) -> str:
    """A stroke (or, closed, a shape) through pixel positions."""
    path = "L".join(f"{coordinate(x)} {coordinate(y)}" for x, y in points)
    return f'<path class="{css}" d="M{path}{"Z" if closed else ""}"/>' if path else ""


def line(x: Axis, y: Axis, xs: Sequence[float], ys: Sequence[float], css: str = "line") -> str:
    """A curve through data points."""
    return polyline([(x.at(a), y.at(b)) for a, b in zip(xs, ys, strict=True)], css)


def band(
    x: Axis, y: Axis, xs: Sequence[float], lows: Sequence[float], highs: Sequence[float], css: str = "band"
) -> str:
    """The area between two curves."""
    there = [(x.at(a), y.at(b)) for a, b in zip(xs, lows, strict=True)]
    back = [(x.at(a), y.at(b)) for a, b in zip(xs, highs, strict=True)]
    return polyline([*there, *reversed(back)], css, closed=True)


def titled(tip: str) -> str:
    """The tooltip of the element it stands in; browsers show it without any script."""
    return f"<title>{escape(tip)}</title>" if tip else ""


def bar(x: float, y: float, width: float, height: float, css: str = "bar", tip: str = "") -> str:
    """A rectangle in pixels."""
    at = f'x="{coordinate(x)}" y="{coordinate(y)}"'
    size = f'width="{coordinate(max(width, 0.0))}" height="{coordinate(max(height, 0.0))}"'
    return f'<rect class="{css}" {at} {size}>{titled(tip)}</rect>'


def marker(shape: str, x: float, y: float, radius: float, css: str = "mark", tip: str = "") -> str:
    """One of SHAPES, centred at a pixel position, of equal visual weight."""
    r = radius
    if shape == "circle":
        cx, cy = coordinate(x), coordinate(y)
        return f'<circle class="{css}" cx="{cx}" cy="{cy}" r="{coordinate(r)}">{titled(tip)}</circle>'
    corners = {
        "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
        "triangle": [(0, -1.2), (1.15, 0.85), (-1.15, 0.85)],
        "diamond": [(0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)],
        "wedge": [(0, 1.2), (1.15, -0.85), (-1.15, -0.85)],
        "cross": [(-0.4, -1.2), (0.4, -1.2), (0.4, -0.4), (1.2, -0.4), (1.2, 0.4), (0.4, 0.4)]
        + [(0.4, 1.2), (-0.4, 1.2), (-0.4, 0.4), (-1.2, 0.4), (-1.2, -0.4), (-0.4, -0.4)],
    }[shape]
    path = "L".join(f"{coordinate(x + r * dx)} {coordinate(y + r * dy)}" for dx, dy in corners)
    return f'<path class="{css}" d="M{path}Z">{titled(tip)}</path>'


def axes(x: Axis, y: Axis, x_label: str, y_label: str, x_format: Format, y_format: Format) -> str:
    """Grid lines, tick labels and axis titles; the y title stands level above the axis, where it is read first."""
    wide = abs(x.end - x.start)
    parts = []
    for value in y.ticks():
        parts.append(segment(x.start, y.at(value), x.end, y.at(value), "grid"))
        parts.append(text(x.start - 7, y.at(value) + 4, y_format(value), "tick", "end"))
    for value in x.ticks(max(2, round(wide / 95))):
        parts.append(segment(x.at(value), y.start, x.at(value), y.start + 4, "axis"))
        parts.append(text(x.at(value), y.start + 17, x_format(value), "tick", "middle"))
    parts.append(segment(x.start, y.start, x.end, y.start, "axis"))
    parts.append(text(x.end, y.start + 35, x_label, "label", "end"))
    parts.append(text(x.start, y.end - 9, y_label, "label"))
    return "".join(parts)


def spread_out(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions near the `wanted` ones, in the same order, at least `gap` apart and inside [low, high] if they fit."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [0.0] * len(wanted)
    previous = -math.inf
    for i in order:
        placed[i] = previous = max(wanted[i], low, previous + gap)
    limit = high
    for i in reversed(order):
        placed[i] = min(placed[i], limit)
        limit = placed[i] - gap
    return placed


def clipped(x: Axis, y: Axis, body: str) -> str:
    """`body`, cut off at the frame of the axes (an inner svg clips without needing an id)."""
    left, top = min(x.start, x.end), min(y.start, y.end)
    box = [coordinate(v) for v in (left, top, abs(x.end - x.start), abs(y.end - y.start))]
    size = f'x="{box[0]}" y="{box[1]}" width="{box[2]}" height="{box[3]}"'
    return f'<svg {size} viewBox="{" ".join(box)}">{body}</svg>'


def svg(width: float, height: float, body: str, label: str) -> str:
    """A drawing that scales with its container; `label` is what a screen reader says."""
    box = f"0 0 {coordinate(width)} {coordinate(height)}"
    return f'<svg class="chart" viewBox="{box}" role="img" aria-label="{escape(label)}">{body}</svg>'


def responsive(draw: Callable[[float], str], wide: float = 940, narrow: float = 380) -> str:
    """The same drawing for a desk and for a phone; the style sheet shows the one that fits."""
    return f'<div class="wide">{draw(wide)}</div><div class="narrow">{draw(narrow)}</div>'

"""Pictures of which experts worked: width, share of tokens and share of work, or a histogram for very many."""

import math
from collections.abc import Mapping, Sequence

from moestro.compare.looks import Look
from moestro.compare.markup import details, paragraph, plain_table
from moestro.compare.numerals import is_number, percent, si, significant
from moestro.compare.plots import Axis, bar, escape, nice_ticks, polyline, segment, svg, text
from moestro.compare.verdict import Verdict

# Up to this many experts every one gets its own bar.
MAX_BARS = 64
# More layers than this are folded away behind the first ones.
SHOWN_LAYERS = 8
_WIDTH = 236
_LEFT, _RIGHT = 38, 234


def expert_shares(widths: Sequence[float], load: Sequence[float]) -> list[dict[str, float]]:
    """Experts from narrow to wide: width, share of all widths, of routed tokens, and of tokens x width (work)."""
    if len(widths) != len(load):
        raise ValueError(f"expert usage: {len(widths)} widths but {len(load)} loads; both need one entry an expert")
    all_tokens, all_widths = sum(load) or 1.0, sum(widths) or 1.0
    all_work = sum(w * n for w, n in zip(widths, load, strict=True)) or 1.0
    order = sorted(range(len(widths)), key=lambda e: (widths[e], e))
    return [
        {
            "expert": e,
            "width": widths[e],
            "of_width": widths[e] / all_widths,
            "of_tokens": load[e] / all_tokens,
            "of_work": widths[e] * load[e] / all_work,
        }
        for e in order
    ]


def share_bars(shares: Sequence[Mapping[str, float]]) -> str:
    """A bar an expert: as wide as the expert, as high as its share of tokens; ribbons lead to its share of work."""
    top, floor, strip = 26, 150, 180
    highest = max(share["of_tokens"] for share in shares)
    y = Axis(0.0, max(highest, 1.0 / len(shares)) * 1.08 or 1.0, floor, top)
    parts = [text(_LEFT, 12, "share of routed tokens", "label")]
    for value in nice_ticks(0.0, y.high, 4):
        parts.append(segment(_LEFT, y.at(value), _RIGHT, y.at(value), "grid"))
        parts.append(text(_LEFT - 6, y.at(value) + 4, percent(value), "tick", "end"))
    left = work_left = float(_LEFT)
    span = _RIGHT - _LEFT
    for i, share in enumerate(shares):
        right, work_right = left + span * share["of_width"], work_left + span * share["of_work"]
        tone = "bar even" if i % 2 == 0 else "bar odd"
        tip = _tip(share)
        parts.append(bar(left, y.at(share["of_tokens"]), right - left, floor - y.at(share["of_tokens"]), tone, tip))
        ribbon = [(left, floor + 1), (right, floor + 1), (work_right, strip), (work_left, strip)]
        parts.append(polyline(ribbon, tone + " ribbon", closed=True))
        parts.append(bar(work_left, strip, work_right - work_left, 11, tone, tip))
        label = significant(share["width"])
        if right - left > 7 * len(label) + 3:
            parts.append(text((left + right) / 2, floor + 13, label, "tick on-ribbon", "middle"))
        left, work_left = right, work_right
    even = y.at(1.0 / len(shares))
    parts.append(segment(_LEFT, even, _RIGHT, even, "reference"))
    parts.append(segment(_LEFT, floor, _RIGHT, floor, "axis"))
    parts.append(text(_RIGHT, strip + 25, "share of work", "label", "end"))
    return svg(_WIDTH, strip + 30, "".join(parts), "Share of tokens by expert, ordered by width")


def _tip(share: Mapping[str, float]) -> str:
    return (
        f"expert {share['expert']:.0f}, width {share['width']:g}: {percent(share['of_tokens'])} of tokens, "
        f"{percent(share['of_width'])} of the width, {percent(share['of_work'])} of the work"
    )


def doubling_bins(load: Sequence[float]) -> list[tuple[str, int]]:
    """How many experts received 0, 1, 2-3, 4-7, ... tokens."""
    counts: dict[int, int] = {}
    for tokens in load:
        place = 0 if tokens < 1 else int(math.log2(tokens)) + 1
        counts[place] = counts.get(place, 0) + 1
    last = max(counts, default=0)
    return [(_bin_name(place), counts.get(place, 0)) for place in range(last + 1)]


def _bin_name(place: int) -> str:
    if place < 2:
        return str(place)
    low, high = 2 ** (place - 1), 2**place - 1
    return f"{significant(low)}–{significant(high)}" if high < 100 else _at_least(low)


def _at_least(low: float) -> str:
    return f"{low:g}+" if low < 1000 else f"{si(low, 2)}+"


def stored_bins(histogram: Mapping) -> list[tuple[str, int]]:
    """The bins of a stored histogram: `experts[i]` experts received `edges[i]` <= tokens < `edges[i + 1]`."""
    edges, counts = histogram["edges"], histogram["experts"]
    if len(edges) != len(counts) + 1:
        raise ValueError(
            f"load_histogram: {len(edges)} edges for {len(counts)} counts of experts; allowed: one edge more"
        )
    names = []
    for low, high in zip(edges, edges[1:], strict=False):
        single = high - low <= 1 and float(low).is_integer()
        names.append(significant(low) if single else _at_least(low) if high >= 100 else f"{low:g}–{high - 1:g}")
    return list(zip(names, counts, strict=True))


def histogram(bins: Sequence[tuple[str, int]]) -> str:
    """Share of experts by the tokens they received."""
    top, floor = 26, 168
    total = sum(count for _, count in bins) or 1
    y = Axis(0.0, max(count for _, count in bins) / total * 1.12 or 1.0, floor, top)
    parts = [text(_LEFT, 12, "share of experts", "label")]
    for value in nice_ticks(0.0, y.high, 4):
        parts.append(segment(_LEFT, y.at(value), _RIGHT, y.at(value), "grid"))
        parts.append(text(_LEFT - 6, y.at(value) + 4, percent(value), "tick", "end"))
    step = (_RIGHT - _LEFT) / len(bins)
    every = math.ceil(len(bins) * 40 / (_RIGHT - _LEFT))
    for i, (name, count) in enumerate(bins):
        x, height = _LEFT + i * step, floor - y.at(count / total)
        tip = f"{count} of {total} experts ({percent(count / total)}) received {name} tokens"
        parts.append(bar(x + 1, floor - height, step - 2, height, "bar odd", tip))
        if i % every == 0:
            parts.append(text(x + step / 2, floor + 15, name, "tick", "middle"))
    parts.append(segment(_LEFT, floor, _RIGHT, floor, "axis"))
    parts.append(text(_RIGHT, floor + 34, "tokens received by an expert", "label", "end"))
    return svg(_WIDTH, floor + 42, "".join(parts), "Share of experts by tokens received")


def _mean(figures: object) -> str | None:
    if isinstance(figures, Mapping):
        figures = figures.get("mean")
    return significant(figures) if is_number(figures) else None


def layer_figures(layer: Mapping) -> list[tuple[str, str]]:
    """The numbers under a layer's picture; what was not recorded is left out."""
    rows = [("experts per token", _mean(layer.get("experts_per_token")))]
    rows.append(("active width", _mean(layer.get("active_width"))))
    if is_number(layer.get("unevenness")):
        rows.append(("unevenness", f"{significant(layer['unevenness'], 2)} nats"))
    if is_number(layer.get("usage")):
        rows.append(("experts used", percent(layer["usage"], 3)))
    if is_number(layer.get("dead")):
        rows.append(("dead", percent(layer["dead"], 3)))
    if is_number(layer.get("tokens")):
        rows.append(("tokens", si(layer["tokens"])))
    return [(name, value) for name, value in rows if value is not None]


def layer_picture(layer: Mapping) -> str:
    """Bars for few experts, a histogram for many, a sentence where no usage was recorded."""
    load, widths = layer.get("load"), layer.get("widths")
    if load and sum(load) > 0:
        if len(load) <= MAX_BARS:
            return share_bars(expert_shares(widths or [1] * len(load), load))
        return histogram(doubling_bins(load))
    stored = layer.get("load_histogram")
    if stored and sum(stored["experts"]) > 0:
        return histogram(stored_bins(stored))
    return '<p class="quiet">No tokens were counted in this layer.</p>'


def layer_figure(name: str, layer: Mapping, look: Look) -> str:
    """One layer of one arm: its picture and its numbers."""
    figures = layer_figures(layer)
    numbers = "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in figures)
    caption = f"<figcaption><strong>{escape(name)}</strong></figcaption>"
    return f'<figure class="layer {look.css}">{caption}{layer_picture(layer)}<dl class="mini">{numbers}</dl></figure>'


def share_rows(name: str, layer: Mapping) -> list[list[str]]:
    """The numbers behind the bars: layer, expert, width, and the three shares."""
    load, widths = layer.get("load"), layer.get("widths")
    if not load or len(load) > MAX_BARS:
        return []
    shares = expert_shares(widths or [1] * len(load), load)
    return [
        [name, str(share["expert"]), f"{share['width']:g}"]
        + [percent(share[field], 3) for field in ("of_width", "of_tokens", "of_work")]
        for share in shares
    ]


def usage_section(verdict: Verdict, looks: Mapping[str, Look]) -> str:
    """The pictures of every arm with experts, best arm first, from the first of its seeds."""
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
    body = f'<div class="grid layers">{"".join(shown)}</div>'
    if folded:
        body += details(f"{len(folded)} more layers", f'<div class="grid layers">{"".join(folded)}</div>')
    if rows:
        titles = ["Layer", "Expert", "Width", "Share of width", "Share of tokens", "Share of work"]
        body += details("Numbers", plain_table(titles, rows))
    where = f"size {run['size']}, seed {run.get('seed')}"
    return f'<div class="arm-block"><h3>{look.name()} <small>{escape(where)}</small></h3>{body}</div>'

"""The page of `moestro inspect`: where one run's compute goes, layer by layer, expert by expert, token by token."""

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from moestro.compare.knob_chart import knob_section
from moestro.compare.looks import Look
from moestro.compare.markup import details, facts, paragraph, plain_table, section, tab_rules
from moestro.compare.numerals import percent, scientific, si, significant
from moestro.compare.page import html_page, write_page
from moestro.compare.plots import PHONE, Axis, bar, escape, marker, padded, responsive, segment, shorten, svg, text
from moestro.compare.token_text import coloured_text, view_rules, views
from moestro.compare.usage import MAX_BARS, SHOWN_LAYERS, expert_shares, layer_figure

MENU = {"width": "Width", "experts": "Experts", "knobs": "Settings", "text": "Text", "setup": "Setup"}
SPREAD = ("mean", "p50", "p99")
ROW = 34


def render_inspection(found: Mapping[str, Any]) -> str:
    """The whole page as HTML, from what `inspect_run` returned: nothing is fetched."""
    run = Look("run", Path(found["run"]).name, "arm arm-1", "circle")
    twin = Look("twin", "homogeneous twin", "arm arm-0", "diamond")
    body = "".join(
        [
            _headline(found, run),
            section("width", "Active width of a token", _width(found["layers"], run, twin)),
            section("experts", "Which experts worked", _experts(found["layers"], run)),
            section("knobs", "More experts or fewer, without training", knob_section(found, run)),
            section("text", "Held-out text, as the layers saw it", _text(found["sample"], run)),
            section("setup", "What was measured", _setup(found)),
        ]
    )
    rules = tab_rules(4) + view_rules(len(views(found["sample"])))
    return html_page("inspect", f"{found['run']}, step {found['step']:,}", MENU, body, rules)


def write_inspection(found: Mapping[str, Any], path: str | os.PathLike) -> Path:
    """Renders the page and puts it at `path` in one step."""
    return write_page(render_inspection(found), path)


def active_share(layers: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Mean active width of a token over all layers, as a share of the twins'; None where nothing is active."""
    own, twin = (sum(side["active_width"]["mean"] for side in sides) for sides in _sides(layers))
    return own / twin if twin else None


def _sides(layers: Mapping[str, Mapping[str, Any]]) -> tuple[list[Mapping], list[Mapping]]:
    return list(layers.values()), [layer["twin"] for layer in layers.values()]


def _headline(found: Mapping[str, Any], run: Look) -> str:
    layers, spending = found["layers"], found["spending"]
    share = active_share(layers)
    if share is None:
        title = f"In {run.title} no expert that was chosen has any width"
    elif abs(share - 1) < 0.0005:
        title = f"A token of {run.title} is served by as much width as equal experts would give it"
    else:
        direction = "less" if share < 1 else "more"
        title = (
            f"A token of {run.title} is served by {percent(abs(share - 1))} {direction} width than equal experts give"
        )
    lead = (
        f"{found['bpb']:.4f} bits per byte on {found['tokens']:,} tokens of {found['data']['name']}. A token touches "
        f"{si(spending['params_active'])} of {si(found['params_total'])} parameters, "
        f"{significant(spending['experts'])} experts a layer, and {scientific(spending['flops'])} forward FLOPs."
    )
    turned = f"Turned without training: {', '.join(found['settings'])}." if found["settings"] else ""
    return (
        f'<section id="result"><h1>{escape(title)}</h1>{paragraph(lead, "lead")}'
        f"{paragraph(turned, 'warning') if turned else ''}</section>"
    )


def _width(layers: Mapping[str, Mapping[str, Any]], run: Look, twin: Look) -> str:
    note = (
        "Hidden units of routed experts that work on a token. A bar spans the median to the 99th percentile, a mark is "
        "the mean. The twin is computed, not trained: as many experts of the same total width, all equally wide and "
        "equally loaded, and as many of them for every token."
    )
    legend = f'<p class="quiet">{run.name()} &nbsp; {twin.name()}</p>'
    chart = f"<figure>{responsive(partial(width_chart, layers, run, twin))}</figure>"
    titles = ["Layer", "Experts", "A token", "Mean", "p50", "p99", "Twin mean", "Twin p50", "Twin p99", "Of twin"]
    rows = []
    for name, layer in layers.items():
        own, other = layer["active_width"], layer["twin"]["active_width"]
        widths = [significant(side[key], 4) for side in (own, other) for key in SPREAD]
        share = percent(own["mean"] / other["mean"], 3) if other["mean"] else "–"
        rows.append([name, f"{layer['n_experts']:,}", significant(layer["experts_per_token"]["mean"]), *widths, share])
    return paragraph(note, "quiet") + legend + chart + plain_table(titles, rows)


def width_chart(layers: Mapping[str, Mapping[str, Any]], run: Look, twin: Look, width: float) -> str:
    """One row a layer: median to 99th percentile as a bar, the mean as a mark; the run above, the twin below."""
    phone = width < PHONE
    left, top = (10.0, 22.0) if phone else (150.0, 8.0)
    row = ROW + (16 if phone else 0)
    bottom = top + row * len(layers)
    reached = [side["active_width"][key] for sides in _sides(layers) for side in sides for key in SPREAD]
    x = Axis(0.0, padded([0.0, *reached], 0.04)[1], left, width - 16)
    parts = [segment(x.start, bottom, x.end, bottom, "axis")]
    for value in x.ticks(max(3, round((x.end - x.start) / 100))):
        parts.append(segment(x.at(value), top, x.at(value), bottom, "grid"))
        parts.append(text(x.at(value), bottom + 17, significant(value, 6), "tick", "middle"))
    for i, (name, layer) in enumerate(layers.items()):
        y = top + row * (i + 0.5) + (4 if phone else 0)
        anchor = (left, y - 18, "start") if phone else (left - 14, y + 4, "end")
        parts.append(text(anchor[0], anchor[1], shorten(name, 22), "name", anchor[2]))
        for look, figures, at in ((run, layer["active_width"], y - 6), (twin, layer["twin"]["active_width"], y + 7)):
            low, high = x.at(figures["p50"]), x.at(figures["p99"])
            tip = (
                f"{name}, {look.title}: mean {figures['mean']:.1f}, p50 {figures['p50']:.0f}, p99 {figures['p99']:.0f}"
            )
            drawn = bar(min(low, high), at - 4, max(abs(high - low), 1.5), 8, "spread", tip)
            drawn += marker(look.shape, x.at(figures["mean"]), at, 4.2, "mark", tip)
            parts.append(f'<g class="{look.css}">{drawn}</g>')
    parts.append(text(x.end, bottom + 36, "active width, hidden units", "label", "end"))
    return svg(width, bottom + 44, "".join(parts), "Active width per token by layer, and that of the twin")


def _experts(layers: Mapping[str, Mapping[str, Any]], run: Look) -> str:
    note = (
        "One bar an expert, ordered by width: as wide as the expert, as high as its share of the routed tokens; its "
        "area is work. Ribbons lead to the share of work (tokens x width) itself. The dashed line is an even share, "
        "where the twin's experts stand."
    )
    if any(layer["n_experts"] > MAX_BARS for layer in layers.values()):
        note += " Layers of many experts show how many of them received how many tokens."
    figures = [layer_figure(name, layer, run) for name, layer in layers.items()]
    shown, folded = figures[:SHOWN_LAYERS], figures[SHOWN_LAYERS:]
    body = f'<div class="grid layers">{"".join(shown)}</div>'
    if folded:
        body += details(f"{len(folded)} more layers", f'<div class="grid layers">{"".join(folded)}</div>')
    rows = [row for name, layer in layers.items() for row in expert_rows(name, layer)]
    if rows:
        titles = ["Layer", "Expert", "Width", "Tokens", "Share of tokens", "Tokens x width", "Share of work"]
        body += details("Numbers", plain_table(titles, rows, n_text=2))
    return paragraph(note, "quiet") + body


def expert_rows(name: str, layer: Mapping[str, Any]) -> list[list[str]]:
    """A row for every expert, and one for each of the twin's; none where the experts are too many for bars."""
    if layer["widths"] is None or layer["n_experts"] > MAX_BARS:
        return []
    shares = {share["expert"]: share for share in expert_shares(layer["widths"], layer["load"])}
    rows = [
        [name, str(e), f"{width:,}", f"{load:,.0f}", percent(shares[e]["of_tokens"], 3), f"{work:,.0f}"]
        + [percent(shares[e]["of_work"], 3)]
        for e, (width, load, work) in enumerate(zip(layer["widths"], layer["load"], layer["work"], strict=True))
    ]
    twin, even = layer["twin"], percent(1 / layer["n_experts"], 3)
    numbers = [significant(twin["width"], 4), f"{twin['load']:,.0f}", even, f"{twin['work']:,.0f}", even]
    return [*rows, [name, "each of the twin's", *numbers]]


def _text(sample: list[Mapping[str, Any]], run: Look) -> str:
    note = (
        "The stronger the colour, the wider the experts that served the token. Point at a token for its loss, and for "
        "its width in every layer."
    )
    return paragraph(note, "quiet") + coloured_text(sample, run, "sample")


def _setup(found: Mapping[str, Any]) -> str:
    data = found["data"]
    return facts(
        {
            "Run": found["run"],
            "Checkpoint": found["checkpoint"],
            "Settings turned": ", ".join(found["settings"]) or "none",
            "Text": data["name"],
            "Text fingerprint": data["fingerprint"],
            "Text read": f"{found['tokens']:,} tokens, {found['bytes']:,} bytes",
            "zlib on this text": f"{data['zlib_bpb']:.3f} bits per byte",
            "Loss": f"{found['loss']:.4f} nats a token, perplexity {significant(found['perplexity'], 4)}",
            "Parameters": f"{found['params_total']:,}",
        }
    )

"""A text whose tokens are coloured by the width, or number, of the experts they used, or by their loss."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moestro.compare.looks import Look
from moestro.compare.markup import paragraph, tabs
from moestro.compare.numerals import is_number, significant
from moestro.compare.plots import escape

# What a layer may record about a token, in order of preference; the first that varies is shown.
MEASURES = {
    "width": "active width",
    "gate_width": "gate-weighted active width",
    "experts": "number of experts",
}
MAX_TIP_LAYERS = 8
LOSS_UNIT = "loss, nats"


@dataclass(frozen=True)
class View:
    """One way to colour the tokens: a value each (None where unknown) and the ends of the scale."""

    name: str
    unit: str
    values: tuple[float | None, ...]
    low: float
    high: float

    @classmethod
    def of(cls, name: str, unit: str, values: Sequence[float | None], low: float | None = None) -> "View":
        """The view whose scale spans the known values (or begins at `low`)."""
        known = [value for value in values if value is not None]
        return cls(name, unit, tuple(values), min(known) if low is None else low, max(known))


def layer_names(tokens: Sequence[Mapping]) -> list[str]:
    """Layers in the order in which the tokens first name them."""
    return list(dict.fromkeys(name for token in tokens for name in token.get("layers") or {}))


def _values(tokens: Sequence[Mapping], layer: str, measure: str) -> list[float | None]:
    found = [((token.get("layers") or {}).get(layer) or {}).get(measure) for token in tokens]
    return [value if is_number(value) else None for value in found]


def _varies(values: Sequence[float | None]) -> bool:
    known = [value for value in values if value is not None]
    return bool(known) and max(known) - min(known) > 1e-9 * max(1.0, abs(max(known)))


def chosen_measure(tokens: Sequence[Mapping]) -> str | None:
    """The first measure that differs between tokens in some layer; None where every token took the same path."""
    for measure in MEASURES:
        if any(_varies(_values(tokens, layer, measure)) for layer in layer_names(tokens)):
            return measure
    return None


def views(tokens: Sequence[Mapping]) -> list[View]:
    """Mean over layers (where there are several), each layer that varies, and the loss, as far as recorded."""
    found = []
    measure = chosen_measure(tokens)
    if measure is not None:
        columns = {layer: _values(tokens, layer, measure) for layer in layer_names(tokens)}
        if len(columns) > 1:
            rows = [[v for v in row if v is not None] for row in zip(*columns.values(), strict=True)]
            means = [sum(row) / len(row) if row else None for row in rows]
            found.append(View.of("mean of layers", MEASURES[measure], means))
        found += [View.of(layer, MEASURES[measure], column) for layer, column in columns.items() if _varies(column)]
    losses = [token.get("loss") if is_number(token.get("loss")) else None for token in tokens]
    if _varies(losses):
        found.append(View.of("loss", LOSS_UNIT, losses, low=0.0))
    return found


def shade(value: float | None, low: float, high: float) -> str:
    """0 to 1, as short CSS text: where `value` lies between `low` and `high`."""
    if value is None or high <= low:
        return "0"
    return f"{(value - low) / (high - low):.2f}".rstrip("0").rstrip(".") or "0"


def visible(token: str) -> str:
    """The token as shown: line breaks keep their effect and get a mark, so that a newline token can be pointed at."""
    return escape(token.replace("\r\n", "\n").replace("\r", "\n")).replace("\n", '<i class="break">⏎</i>\n')


def _tip(token: Mapping) -> str:
    loss = token.get("loss")
    lines = [f"‘{token['text']}’  loss {loss:.2f} nats" if is_number(loss) else f"‘{token['text']}’"]
    layers = token.get("layers") or {}
    for name, used in list(layers.items())[:MAX_TIP_LAYERS]:
        parts = [f"{MEASURES[key]} {significant(used[key], 4)}" for key in MEASURES if is_number(used.get(key))]
        lines.append(f"{name}: {', '.join(parts)}")
    if len(layers) > MAX_TIP_LAYERS:
        lines.append(f"and {len(layers) - MAX_TIP_LAYERS} more layers")
    return "\n".join(lines)


def _token(token: Mapping, shades: Sequence[str]) -> str:
    style = ";".join(f"--v{i}:{value}" for i, value in enumerate(shades))
    return f'<span class="token" style="{style}" title="{escape(_tip(token))}">{visible(token["text"])}</span>'


def _legend(number: int, view: View) -> str:
    low, high = significant(view.low), significant(view.high)
    ramp = "".join(f'<i style="--v:{step / 8}"></i>' for step in range(9))
    unit = view.unit if view.unit == LOSS_UNIT else f"{view.unit}, {view.name}"
    return f'<p class="legend legend-{number}">{escape(unit)}: {low} <span class="ramp">{ramp}</span> {high}</p>'


def coloured_text(tokens: Sequence[Mapping], look: Look, group: str) -> str:
    """The sample as one arm saw it, with a choice of what the colour stands for; works without scripts."""
    if not tokens:
        return '<p class="quiet">No sample was recorded for this arm.</p>'
    shown = views(tokens)
    columns = [[shade(value, view.low, view.high) for value in view.values] for view in shown]
    shades = list(zip(*columns, strict=True)) if columns else [()] * len(tokens)
    text = "".join(_token(token, row) for token, row in zip(tokens, shades, strict=True))
    note = "" if chosen_measure(tokens) else f'<p class="quiet">{_same_path(tokens)}</p>'
    choices = "".join(
        f'<input type="radio" class="view view-{i}" name="{group}" id="{group}-{i}"{" checked" if i == 0 else ""}>'
        f'<label for="{group}-{i}">{escape(view.name)}</label>'
        for i, view in enumerate(shown)
    )
    # A single choice has to be checked for its rule to apply, but needs no button.
    choices = choices.replace("<label", "<label hidden") if len(shown) == 1 else choices
    legends = "".join(_legend(i, view) for i, view in enumerate(shown))
    return f'<div class="sample {look.css}">{choices}{note}{legends}<div class="text">{text}</div></div>'


def _same_path(tokens: Sequence[Mapping]) -> str:
    names = layer_names(tokens)
    if not names:
        return "Every token takes the same dense path, so only the loss can be coloured."
    used = next(iter((token.get("layers") or {}).get(names[0]) or {} for token in tokens))
    figures = [f"{MEASURES[key]} {significant(used[key], 4)}" for key in MEASURES if is_number(used.get(key))]
    return f"Every token used the same amount ({escape(', '.join(figures))} in {escape(names[0])}); colour shows loss."


def view_rules(n_views: int) -> str:
    """Style rules that let the chosen radio button pick the tokens' shade and the legend."""
    return "".join(
        f".view-{i}:checked~.text .token{{--v:var(--v{i})}}.view-{i}:checked~.legend-{i}{{display:block}}"
        for i in range(n_views)
    )


def sample_section(results: Mapping, looks: Mapping[str, Look]) -> str:
    """The sample text with a choice of arms."""
    samples = results.get("sample") or {}
    panels = {
        look.name(): coloured_text(samples.get(arm) or [], look, f"sample-{i}")
        for i, (arm, look) in enumerate(looks.items())
    }
    # The arm whose tokens differ in most ways has most to show.
    richest = max(range(len(panels)), key=lambda i: (len(views(samples.get(list(looks)[i]) or [])), -i), default=0)
    if not any(samples.get(arm) for arm in looks):
        return paragraph("No sample text was recorded.", "quiet")
    note = (
        "The stronger the colour, the more of the layer worked on that token. Point at a token for its loss and its "
        "figures in every layer. Scales are those of the arm and the layer shown."
    )
    return paragraph(note, "quiet") + tabs("sample", panels, richest)

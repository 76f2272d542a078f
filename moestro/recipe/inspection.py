"""Where a run's compute goes: experts, layers and tokens, beside a homogeneous twin, and at other settings."""

from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.table import Table

from moestro.evaluate import evaluate, knobs, quality_curve, routing_report, sample_text, token_sample
from moestro.evaluate.knobs import spending
from moestro.model.active import total_parameters
from moestro.recipe.evaluation import LISTED, Run, about, figures_head, plain_table, short
from moestro.recipe.syntax import RecipeError

# Held-out tokens that are looked at where the user does not say; every setting of a knob sees them again.
TOKENS = 65_536
CHARACTERS = 1400
SPREAD = ("mean", "p50", "p99")


def inspect_run(run: Run, max_tokens: int | None = TOKENS) -> dict[str, Any]:
    """What a run's experts do on `max_tokens` of its text, as JSON values.

    `layers`: the figures of `routing_report` with each expert's `work` (tokens x width) and the `twin`; `curves`: for
    each knob that the model has, quality and cost at a ladder of its settings; `sample`: text, token by token.

    Raises: RecipeError where its model has no mixture layers.
    """
    model, dataset, precision = run.model, run.dataset, run.precision
    if not model.moe_layers():
        raise RecipeError(f"{run.folder}: its model has no mixture layers to look into; moestro eval gives its figures")

    def held_out():
        return run.held_out(max_tokens)

    layers = routing_report(model, held_out(), precision=precision)
    return {
        **about(run),
        **evaluate(model, held_out(), precision=precision),
        "params_total": total_parameters(model),
        "spending": spending(model, held_out(), precision=precision),
        "layers": {name: {**figures, **beside_twin(figures)} for name, figures in layers.items()},
        "curves": {knob: quality_curve(model, held_out, knob, precision=precision) for knob in knobs(model)},
        "sample": token_sample(model, dataset.tokenizer, sample_text(dataset, CHARACTERS), precision=precision),
    }


def beside_twin(figures: Mapping[str, Any]) -> dict[str, Any]:
    """`work`: tokens x width of every expert (None where experts are too many to list); and the homogeneous `twin`.

    The twin is computed, not trained: as many experts of the same total width, all equally wide and equally loaded,
    with as many of them for every token. Its active width is therefore experts per token times the mean width.
    """
    widths, load = figures["widths"], figures["load"]
    if widths is None:
        # only experts of one width are too many to list
        width = figures["active_width"]["mean"] / max(figures["experts_per_token"]["mean"], 1e-12)
    else:
        width = sum(widths) / len(widths)
    active = {key: figures["experts_per_token"][key] * width for key in SPREAD}
    work = None if widths is None else [w * n for w, n in zip(widths, load, strict=True)]
    rows = figures["experts_per_token"]["mean"] * figures["tokens"] / figures["n_experts"]
    return {"work": work, "twin": {"width": width, "load": rows, "work": rows * width, "active_width": active}}


def inspection_table(found: Mapping[str, Any]) -> Group:
    """What `inspect_run` returned, for a terminal."""
    parts = [figures_head(found), _width_table(found["layers"])]
    if any(layer["widths"] is not None and layer["n_experts"] <= LISTED for layer in found["layers"].values()):
        parts.append(_expert_table(found["layers"]))
    return Group(*parts, *(_curve_table(knob, curve) for knob, curve in found["curves"].items()))


def _width_table(layers: Mapping[str, Mapping[str, Any]]) -> Table:
    titles = ("layer", "experts", "a token", "width", "p50/p99", "twin", "p50/p99", "ratio")
    table = plain_table("active width of a token, and that of a homogeneous twin (computed, not trained)", titles)
    for name, layer in layers.items():
        own, twin = layer["active_width"], layer["twin"]["active_width"]
        table.add_row(
            short(name),
            f"{layer['n_experts']:,}",
            f"{layer['experts_per_token']['mean']:.2f}",
            f"{own['mean']:.1f}",
            f"{own['p50']:.0f}/{own['p99']:.0f}",
            f"{twin['mean']:.1f}",
            f"{twin['p50']:.0f}/{twin['p99']:.0f}",
            f"{own['mean'] / twin['mean']:.3f}" if twin["mean"] else "-",
        )
    return table


def _expert_table(layers: Mapping[str, Mapping[str, Any]]) -> Table:
    titles = ("layer", "expert", "width", "tokens", "% of rows", "tokens x width", "% of work", "twin %")
    table = plain_table("experts (twin: every expert's share of rows and of work)", titles)
    for name, layer in layers.items():
        if layer["widths"] is None or layer["n_experts"] > LISTED:
            continue
        rows, work = sum(layer["load"]) or 1.0, sum(layer["work"]) or 1.0
        for e, (width, load) in enumerate(zip(layer["widths"], layer["load"], strict=True)):
            shares = f"{100 * load / rows:.1f}", f"{width * load:,.0f}", f"{100 * width * load / work:.1f}"
            even = f"{100 / layer['n_experts']:.1f}"
            table.add_row("" if e else short(name), f"{e}", f"{width:,}", f"{load:,.0f}", *shares, even)
        table.add_section()
    return table


def _curve_table(knob: str, curve: Mapping[str, Any]) -> Table:
    titles = (knob, "bits per byte", "experts", "active params", "FLOPs a token")
    table = plain_table(f"the same weights at other values of {knob} (* as it is now)", titles)
    for point in curve["points"]:
        mark = "*" if point["value"] == curve["now"] else ""
        table.add_row(
            f"{mark}{point['value']:g}",
            f"{point['bpb']:.4f}",
            f"{point['experts']:.2f}",
            f"{point['params_active']:,.0f}",
            f"{point['flops']:.3g}",
        )
    return table

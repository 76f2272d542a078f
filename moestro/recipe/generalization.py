"""`moestro inspect --generalization`: the terms of the generalization bound of a run."""

from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.table import Table

from moestro.evaluate import generalization_report
from moestro.recipe.evaluation import Run, about, plain_table, short
from moestro.recipe.inspection import TOKENS
from moestro.recipe.syntax import RecipeError
from moestro.train.checkpoint import read_state

BOUND = "O(4 C R + 2 sqrt((sum of 2 d ln N + d ln 2m + ln(4/delta)) / 2m)), arXiv:2403.17404"


def generalization_of_run(run: Run, max_tokens: int | None = TOKENS) -> dict[str, Any]:
    """What `generalization_report` finds for a run, as JSON values: samples are the training tokens that it read, each
    once, or windows of them. Gates and inputs are measured on `max_tokens` of its text.

    Raises: RecipeError where its model has no mixture layers, or no step of training is over.
    """
    if not run.model.moe_layers():
        raise RecipeError(f"{run.folder}: its model has no mixture layers, and the bound is about what routers select")
    if not run.step:
        raise RecipeError(f"{run.folder}: its training has not begun, and the bound is about samples of training text")
    read = int(read_state(run.checkpoint)["counters"]["tokens"])
    tokens = min(read, run.dataset.n_train_tokens) if run.own_text else read
    units = {"tokens": tokens, "sequences": max(1, tokens // run.dataset.seq_len)}
    found = generalization_report(run.model, run.held_out(max_tokens), units, precision=run.precision)
    return {**about(run), **found}


def generalization_table(found: Mapping[str, Any]) -> Group:
    """What `generalization_of_run` returned, for a terminal."""
    layers = found["layers"]
    return Group(_bounds(found), _selections(layers), _experts(layers), _remarks(found))


def _bounds(found: Mapping[str, Any]) -> Table:
    title = f"{found['run']}, step {found['step']:,}: {BOUND}; C = {found['lipschitz']:g}, delta = {found['delta']:g}"
    titles = ("unit", "m", "ln N", "router", "no choice", "experts", "spectral*", "total*")
    table = plain_table(title, titles)
    for unit, counts in found["bounds"].items():
        for count, terms in counts.items():
            keys = ("router", "router_without_patterns", "experts", "experts_spectral", "total")
            table.add_row(unit, f"{found['units'][unit]:,}", count, *(_number(terms[key]) for key in keys))
    return table


def _selections(layers: Mapping[str, Mapping[str, Any]]) -> Table:
    titles = ("layer", "T", "k", "mean k", "d", "ln N paper", "ln N exact", "s (tokens)")
    table = plain_table("what routers select (s: sparse factor)", titles)
    for name, layer in layers.items():
        pool = f" of {layer['pool']:,}" if layer["pool"] != layer["n_experts"] else ""
        table.add_row(
            short(name),
            f"{layer['n_experts']:,}{pool}",
            "any" if layer["most"] is None else f"{layer['most']:,}",
            f"{layer['mean_k']:.2f}",
            f"{layer['dimension']:,}",
            _number(layer["patterns"]["paper"]),
            _number(layer["patterns"]["exact"]),
            _number(layer["sparse_factor"].get("tokens")),
        )
    return table


def _experts(layers: Mapping[str, Mapping[str, Any]]) -> Table:
    titles = ("layer", "sum of gates", "input norm", "Frobenius", "spectral", "parts a token")
    table = plain_table("what experts are (greatest that were seen; norms: product over an expert's matrices)", titles)
    for name, layer in layers.items():
        norms = layer["norm_product"] or {"frobenius": None, "spectral": None}
        found = (layer["mixture_mass"], layer["input_norm"], norms["frobenius"], norms["spectral"])
        table.add_row(short(name), *map(_number, found), f"{layer['parts_per_token']:.2f}")
    return table


def _remarks(found: Mapping[str, Any]) -> Table:
    """Every remark once, with the layers that it is about."""
    table = plain_table("* heuristic: what no theorem covers", ("remark", "layers"))
    about_layers: dict[str, list[str]] = {}
    for name, layer in found["layers"].items():
        unbounded = () if layer["applicable"] else ("selections depend on other tokens: there is no bound",)
        for remark in (*layer["heuristic"], *unbounded):
            about_layers.setdefault(remark, []).append(short(name))
    for remark in found["heuristic"]:
        table.add_row(remark, "all")
    for remark, names in about_layers.items():
        table.add_row(remark, "all" if len(names) == len(found["layers"]) else ", ".join(names))
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"

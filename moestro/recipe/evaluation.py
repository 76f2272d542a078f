"""A trained run on held-out or other text: figures, and how they look on a terminal."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.table import Table

from moestro.data import Dataset, Source, TokenData, load_tokenizer, source_for, zlib_bpb
from moestro.evaluate import evaluate, routing_report
from moestro.recipe.build import build_data, build_model
from moestro.recipe.load import BINDER, Recipe, load_recipe
from moestro.recipe.parts import SOURCES
from moestro.recipe.resolve import Origin, Place
from moestro.recipe.syntax import RecipeError, parse_yaml
from moestro.train import best_checkpoint, load_weights, newest_checkpoint
from moestro.train.checkpoint import step_of

CHECKPOINTS = {"newest": newest_checkpoint, "best": best_checkpoint}


def evaluate_run(
    run_dir: str | Path,
    data: str | None = None,
    device: str | torch.device = "cpu",
    max_tokens: int | None = None,
    checkpoint: str = "newest",
) -> dict[str, Any]:
    """Bits per byte, perplexity and routing figures of a run's `newest` or `best` checkpoint.

    `data` is a file, folder or pattern, the name of a source, or a source as in a recipe (`{kind: ..., ...}`), and all
    of it is evaluated; without it, the held-out part of the run's own text is. The tokenizer is the run's.

    Raises: RecipeError where `run_dir` is no run; CheckpointError where it has no intact checkpoint.
    """
    folder = Path(run_dir)
    recipe = _recipe_of(folder)
    path = CHECKPOINTS[checkpoint](folder)
    dataset = _data_of(folder, recipe, data).prepare()
    model = build_model(recipe, dataset.vocab_size, device)
    load_weights(model, path)
    batch_size = recipe.train.keywords.get("batch_size", 16)
    precision = recipe.train.keywords.get("precision", "fp32")
    figures = evaluate(model, dataset.val_batches(batch_size, max_tokens), precision=precision)
    layers = routing_report(model, dataset.val_batches(batch_size, max_tokens), precision=precision)
    about = {"run": str(folder), "checkpoint": path.name, "step": step_of(path), "data": _describe(dataset)}
    return {**about, **figures, "layers": layers}


def _recipe_of(folder: Path) -> Recipe:
    if not (folder / "recipe.yaml").is_file():
        raise RecipeError(f"{folder} is not the folder of a run: it holds no recipe.yaml")
    return load_recipe(folder / "recipe.yaml")


def _data_of(folder: Path, recipe: Recipe, data: str | None) -> TokenData:
    tokenizer = load_tokenizer(folder / "tokenizer")
    if data is None:
        own = build_data(recipe)
        own.tokenizer = tokenizer
        return own
    return TokenData(_source(data), tokenizer, recipe.data.keywords["seq_len"], val_fraction=1.0)


def _source(data: str) -> Source:
    """The source that a word on the command line stands for."""
    if data.lstrip().startswith("{"):
        node = parse_yaml(data, "--data")
        return BINDER.part("source", node, Place(Origin(Path("--data"), {}))).build()
    if data in SOURCES and not Path(data).exists():
        return BINDER.part("source", {"kind": data}, Place(Origin(Path("--data"), {}))).build()
    try:
        return source_for(data)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{error} (--data; or a source: {', '.join(SOURCES)})") from error


def _describe(dataset: Dataset) -> dict[str, Any]:
    return {"name": dataset.name, "fingerprint": dataset.text_fingerprint, "zlib_bpb": zlib_bpb(dataset)}


def figures_table(figures: Mapping[str, Any]) -> Group:
    """What `evaluate_run` returned, for a terminal."""
    data = figures["data"]
    table = Table(title=f"{figures['run']}, step {figures['step']}, on {data['name']}", title_justify="left")
    for title in ("bits per byte", "zlib -9", "perplexity", "nats/token", "tokens", "bytes"):
        table.add_column(title, justify="right")
    table.add_row(
        f"{figures['bpb']:.4f}",
        f"{data['zlib_bpb']:.4f}",
        f"{figures['perplexity']:.2f}",
        f"{figures['loss']:.4f}",
        f"{figures['tokens']:,}",
        f"{figures['bytes']:,}",
    )
    return Group(table, *([_layer_table(figures["layers"])] if figures["layers"] else []))


def _layer_table(layers: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(title="routing", title_justify="left")
    table.add_column("layer")
    for title in ("experts", "experts/token", "p99", "active width", "p99", "unevenness", "used", "dead", "load"):
        table.add_column(title, justify="right")
    for name, layer in layers.items():
        experts, width = layer["experts_per_token"], layer["active_width"]
        table.add_row(
            name,
            f"{layer['n_experts']:,}",
            f"{experts['mean']:.2f}",
            f"{experts['p99']:.0f}",
            f"{width['mean']:.1f}",
            f"{width['p99']:.0f}",
            f"{layer['unevenness']:.3f}",
            f"{layer['usage']:.1%}",
            f"{layer['dead']:.1%}",
            _load_text(layer),
        )
    table.caption = "unevenness: KL of the gates' shares from uniform, nats. load: share of rows, expert by expert"
    return table


def _load_text(layer: Mapping[str, Any]) -> str:
    """Shares of the rows in percent where they fit on a line, else their range."""
    load = layer["load"]
    if load is None:
        return "-"
    shares = [100 * rows / max(1.0, sum(load)) for rows in load]
    if len(shares) <= 16:
        return " ".join(f"{share:.0f}" for share in shares)
    return f"{min(shares):.2f} to {max(shares):.2f}"

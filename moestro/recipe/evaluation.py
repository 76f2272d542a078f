"""A trained run on held-out or other text: figures, and how they look on a terminal."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich import box
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

# Most experts whose loads are shown one by one.
LISTED = 64
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
    batch_size = recipe.train.value("batch_size")
    precision = recipe.train.value("precision")
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
    return TokenData(_source(data), tokenizer, recipe.data.value("seq_len"), val_fraction=1.0)


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
    data, layers = figures["data"], figures["layers"]
    titles = ("bits per byte", "zlib -9", "perplexity", "nats/token", "tokens", "bytes")
    table = _table(f"{figures['run']}, step {figures['step']:,}, on {data['name']}", titles)
    table.add_row(
        f"{figures['bpb']:.4f}",
        f"{data['zlib_bpb']:.4f}",
        f"{figures['perplexity']:.2f}",
        f"{figures['loss']:.4f}",
        f"{figures['tokens']:,}",
        f"{figures['bytes']:,}",
    )
    return Group(table, *([_routing_table(layers), _load_table(layers)] if layers else []))


def _routing_table(layers: Mapping[str, Mapping[str, Any]]) -> Table:
    titles = ("layer", "experts", "a token", "p99", "width", "p99", "uneven", "used", "dead")
    table = _table("routing (uneven: KL of the gates from uniform, in nats)", titles)
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
        )
    return table


def _load_table(layers: Mapping[str, Mapping[str, Any]]) -> Table:
    table = _table("load (% of rows, expert by expert)", ("layer", "load"))
    for name, layer in layers.items():
        table.add_row(name, _load_text(layer))
    return table


def _load_text(layer: Mapping[str, Any]) -> str:
    load, histogram = layer["load"], layer["load_histogram"]
    if load is None:
        bins = zip(histogram["edges"], histogram["experts"], strict=False)
        return ", ".join(f"{n:,} with {low:,} or more" for low, n in bins if n)
    if len(load) <= LISTED:
        return " ".join(f"{100 * rows / max(1.0, sum(load)):.1f}" for rows in load)
    return f"{min(load):,.0f} to {max(load):,.0f} rows an expert"


def _table(title: str, titles: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD)
    for name in titles:
        table.add_column(name, justify="left" if name in ("layer", "load") else "right", no_wrap=name == "layer")
    return table

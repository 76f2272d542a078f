"""A trained run on held-out or other text: figures, and how they look on a terminal."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Group
from rich.table import Table

from moestro.data import Batch, Dataset, Source, TokenData, load_tokenizer, source_for, zlib_bpb
from moestro.data.records import MissingField
from moestro.evaluate import capacity_report, evaluate, routing_report
from moestro.evaluate.knobs import KNOBS
from moestro.model import Transformer
from moestro.recipe.build import build_data, build_model
from moestro.recipe.load import BINDER, Recipe, load_recipe
from moestro.recipe.parts import SOURCES
from moestro.recipe.pretrained import Pretrained
from moestro.recipe.resolve import Origin, Place
from moestro.recipe.syntax import RecipeError, parse_yaml
from moestro.train import best_checkpoint, load_weights, newest_checkpoint
from moestro.train.checkpoint import list_checkpoints, step_of

# Most experts whose loads are shown one by one.
LISTED = 64
NAME_WIDTH = 16
# Columns of words.
LEFT = ("layer", "load", "metric", "remark", "task", "unit", "by expert 0, 1, 2, ...")
CHECKPOINTS = {"newest": newest_checkpoint, "best": best_checkpoint}


@dataclass(frozen=True)
class Run:
    """A trained run, ready to be measured: its model with a checkpoint's weights, and text, which is held out of its
    own where `own_text`. `checkpoint` is the pretrained folder, `step` 0, where training has not begun."""

    folder: Path
    checkpoint: Path
    step: int
    model: Transformer
    dataset: Dataset
    own_text: bool
    batch_size: int
    precision: str
    settings: tuple[str, ...]

    def held_out(self, max_tokens: int | None = None) -> Iterator[Batch]:
        """The text in batches, `max_tokens` of it (all where None)."""
        return self.dataset.val_batches(self.batch_size, max_tokens)


def opened_run(
    run_dir: str | Path,
    data: str | None = None,
    device: str | torch.device = "cpu",
    checkpoint: str = "newest",
    settings: Sequence[str] = (),
) -> Run:
    """A run's `newest` or `best` checkpoint, and text for it.

    `data` is a file, folder or pattern, the name of a source, or a source as in a recipe (`{kind: ..., ...}`), and all
    of it is the text; without it, the held-out part of the run's own is. The tokenizer is the run's. `settings` turn
    knobs without training: `model.ffn.router.select.threshold=0.4`, or a `top_k`.

    Raises: RecipeError where `run_dir` is no run or a setting is no knob; CheckpointError where it has no intact
    checkpoint.
    """
    folder = Path(run_dir)
    recipe = turned_recipe(folder, settings)
    build_model(recipe, vocab_size=1, device="meta")
    start = untrained(recipe, folder)
    path = start or CHECKPOINTS[checkpoint](folder)
    dataset = _prepared(_data_of(folder, recipe, data), data)
    model = build_model(recipe, dataset.vocab_size, device)
    if start is None:
        load_weights(model, path)
    batch_size = recipe.train.value("batch_size") // recipe.train.value("accumulate")
    precision = recipe.train.value("precision")
    step = 0 if start else step_of(path)
    return Run(folder, path, step, model, dataset, data is None, batch_size, precision, tuple(settings))


def untrained(recipe: Recipe, folder: Path) -> Path | None:
    """The pretrained folder whose weights a run still has: it has no checkpoint yet. None for every other run."""
    plan = recipe.model
    return plan.folder if isinstance(plan, Pretrained) and not list_checkpoints(folder / "checkpoints") else None


def evaluate_run(run: Run, max_tokens: int | None = None) -> dict[str, Any]:
    """Bits per byte, perplexity and routing figures of a run on `max_tokens` of its text (all of it where None)."""

    def reported(report: Callable[..., dict[str, Any]]) -> dict[str, Any]:
        return report(run.model, run.held_out(max_tokens), precision=run.precision)

    figures = reported(evaluate)
    return {**about(run), **figures, "layers": reported(routing_report), "passes": reported(capacity_report)}


def about(run: Run) -> dict[str, Any]:
    """Which run, checkpoint and text were measured, with which knobs turned, as JSON values."""
    return {
        "run": str(run.folder),
        "checkpoint": run.checkpoint.name,
        "step": run.step,
        "settings": list(run.settings),
        "data": _describe(run.dataset),
    }


def turned_recipe(folder: Path, settings: Sequence[str]) -> Recipe:
    """The recipe of the run in a folder with knobs turned: `settings` as for `opened_run`.

    Raises: RecipeError where it is no run or a setting is no knob.
    """
    if not folder.is_dir():
        raise RecipeError(f"no such run folder: {folder}")
    if not (folder / "recipe.yaml").is_file():
        raise RecipeError(f"{folder} is not the folder of a run: it holds no recipe.yaml")
    for setting in settings:
        keys = setting.partition("=")[0].strip().split(".")
        if keys[0] != "model" or "router" not in keys or keys[-1] not in KNOBS:
            raise RecipeError(
                f"{setting!r} cannot be changed after training; allowed: {' and '.join(KNOBS)} of a router, such as "
                "model.ffn.router.select.threshold=0.4 (--set)"
            )
    return load_recipe(folder / "recipe.yaml", settings)


def _data_of(folder: Path, recipe: Recipe, data: str | None) -> TokenData:
    tokenizer = load_tokenizer(folder / "tokenizer")
    if data is None:
        own = build_data(recipe)
        own.tokenizer = tokenizer
        return own
    return TokenData(_source(data), tokenizer, recipe.data.value("seq_len"), val_fraction=1.0)


def _prepared(text: TokenData, data: str | None) -> Dataset:
    try:
        return text.prepare()
    except MissingField as error:
        # only the text of --data comes here without its place
        kind = next(name for name, make in SOURCES.items() if type(text.source) is make)
        paths = data if data and not data.lstrip().startswith("{") else "..."
        example = f"{{kind: {kind}, paths: {paths}, text_field: {next(iter(error.there), 'text')}}}"
        raise RecipeError(f"{error}, for example --data '{example}'") from error
    except (OSError, ValueError) as error:
        if data is None or isinstance(error, RecipeError):
            raise
        raise RecipeError(f"{error} (--data)") from error


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
    layers = figures["layers"]
    passes = [_passes_table(figures["passes"])] if figures["passes"] else []
    return Group(figures_head(figures), *([_routing_table(layers), _load_table(layers)] if layers else []), *passes)


def figures_head(figures: Mapping[str, Any]) -> Table:
    """How good the run is, in one line."""
    data, turned = figures["data"], "".join(f", {setting}" for setting in figures["settings"])
    titles = ("bits per byte", "zlib -9", "perplexity", "nats/token", "tokens", "bytes")
    table = plain_table(f"{figures['run']}, step {figures['step']:,}{turned}, on {data['name']}", titles)
    table.add_row(
        f"{figures['bpb']:.4f}",
        f"{data['zlib_bpb']:.4f}",
        f"{figures['perplexity']:.2f}",
        f"{figures['loss']:.4f}",
        f"{figures['tokens']:,}",
        f"{figures['bytes']:,}",
    )
    return table


def _routing_table(layers: Mapping[str, Mapping[str, Any]]) -> Table:
    titles = ("layer", "experts", "a token", "p99", "width", "p99", "uneven", "used", "dead")
    table = plain_table("routing (uneven: KL of the gates from uniform, in nats)", titles)
    for name, layer in layers.items():
        experts, width = layer["experts_per_token"], layer["active_width"]
        table.add_row(
            short(name),
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
    table = plain_table("load (% of rows, expert by expert)", ("layer", "load"))
    for name, layer in layers.items():
        table.add_row(short(name), _load_text(layer))
    return table


def _passes_table(layers: Mapping[str, Mapping[str, Any]]) -> Table:
    titles = ("layer", "passes", "share with 1, 2, ...", "rare to frequent")
    table = plain_table("passes of a token through its strata, and by how frequent its word is in this text", titles)
    for name, layer in layers.items():
        shares = " ".join(f"{share:.1%}" for share in layer["passes"])
        table.add_row(
            short(name), f"{layer['mean']:.3f}", shares, " ".join(f"{mean:.3f}" for mean in layer["by_frequency"])
        )
    return table


def _load_text(layer: Mapping[str, Any]) -> str:
    load, histogram = layer["load"], layer["load_histogram"]
    if load is None:
        bins = zip(histogram["edges"], histogram["experts"], strict=False)
        return ", ".join(f"{n:,} with {low:,} or more" for low, n in bins if n)
    if len(load) <= LISTED:
        return " ".join(f"{100 * rows / max(1.0, sum(load)):.1f}" for rows in load)
    return f"{min(load):,.0f} to {max(load):,.0f} rows an expert"


def short(layer: str) -> str:
    """A layer's name as tables have it: those inside other layers leave out `blocks.`, so that numbers keep room."""
    return layer if len(layer) <= NAME_WIDTH else layer.removeprefix("blocks.")


def plain_table(title: str, titles: tuple[str, ...]) -> Table:
    """An empty table; layers and loads stand left, numbers right."""
    table = Table(title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD)
    for name in titles:
        table.add_column(name, justify="left" if name in LEFT else "right", no_wrap=name == "layer")
    return table

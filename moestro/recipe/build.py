"""Recipes -> objects, and the whole of one training run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moestro.data import TokenData, Tokenizer
from moestro.model import Block, PassedBlock, Transformer
from moestro.ops.tables import tables_in
from moestro.ops.whole_files import forget_hashes, record_hashes
from moestro.parallel.ranks import Ranks, joined
from moestro.recipe.adapt import require_same_tokenizer, start_adapted
from moestro.recipe.bind import built
from moestro.recipe.load import Decoder, Recipe, load_recipe
from moestro.recipe.memory import require_memory
from moestro.recipe.pretrained import Pretrained, hosted
from moestro.recipe.resolve import Origin, Place
from moestro.recipe.shared_banks import SharedBanks
from moestro.recipe.sources import PlacedSource
from moestro.recipe.syntax import RecipeError
from moestro.train.checkpoint import list_checkpoints
from moestro.train.folder import RunFolder, require_writable, unwritable
from moestro.train.loop import train
from moestro.train.progress import Display
from moestro.train.rules import Rule
from moestro.train.settings import TrainSettings
from moestro.train.state import FREE
from moestro.train.step import ScheduledObjectives


def build_model(
    recipe: Recipe, vocab_size: int, device: str | torch.device = "cpu", from_start: bool = False
) -> Transformer:
    """The recipe's decoder; a `Hosted`, which is called alike, where it is pretrained. Weights that are not read from a
    folder are a function of the recipe's seed alone, on every device; with `from_start`, and of those of the run that
    `adapt.start` names.

    Raises: RecipeError where a part refuses its values.
    """
    if torch.device(device).type == "meta":
        with torch.device("meta"):
            return _adapted(recipe, vocab_size, False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.train.value("seed"))
        return _adapted(recipe, vocab_size, from_start).to(device)


def _adapted(recipe: Recipe, vocab_size: int, from_start: bool) -> Transformer:
    plan = recipe.model
    if isinstance(plan, Pretrained):
        model: Transformer = hosted(plan, vocab_size, recipe.data.value("seq_len"), recipe.origin)  # type: ignore[assignment]
    else:
        model = assemble(plan, vocab_size, recipe.origin)
    if recipe.adapt is not None:
        start_adapted(recipe.adapt, model, from_start, plan.allow_non_causal)
    return model


def assemble(plan: Decoder, vocab_size: int, origin: Origin) -> Transformer:
    """The decoder of a bound `model` section; weights are drawn from torch's default generator.

    Raises: RecipeError where a part refuses its values.
    """
    context: dict[str, Any] = {"d_model": plan.d_model}
    context["shared_banks"] = SharedBanks(plan.shared_banks, {"d_model": plan.d_model})
    depths = plan.depths and plan.depths.build()
    parts = [(plan.attention.build(context), plan.layers.get(i, plan.ffn).build(context)) for i in range(plan.n_layers)]
    try:
        blocks = [
            PassedBlock(plan.d_model, *own, plan.norm_eps, depths.share)
            if depths and depths.passes_by(i)
            else Block(plan.d_model, *own, plan.norm_eps)
            for i, own in enumerate(parts)
        ]
        return Transformer(vocab_size, plan.d_model, blocks, plan.tie_embeddings, plan.norm_eps, plan.allow_non_causal)
    except ValueError as error:
        raise Place(origin, ("model",)).error(str(error)) from error


def build_data(recipe: Recipe) -> TokenData:
    """Corpus, tokenizer and window length; `prepare` makes the data set.

    Raises: RecipeError where a part refuses its values; `prepare` does, too, where a source's files are missing.
    """
    data: TokenData = recipe.data.build()
    data.source = PlacedSource(data.source, recipe.data.keywords["source"])
    if data.val_source is not None:
        data.val_source = PlacedSource(data.val_source, recipe.data.keywords["val_source"])
    return data


def build_training(recipe: Recipe) -> tuple[TrainSettings, ScheduledObjectives, list[Rule]]:
    """Settings, objectives with their weights, rules.

    Raises: RecipeError where one of them refuses its values.
    """
    settings = recipe.train.build({"optim": recipe.optim.build(), "parallel": recipe.parallel.build()})
    objectives = [(name, built(weight, {}), part.build()) for name, weight, part in recipe.objectives]
    return settings, objectives, [part.build() for part in recipe.rules]


def run_training(
    recipe: Recipe,
    run_dir: str | Path,
    device: str | torch.device = "cpu",
    progress: Display | None = None,
    show_preparation: bool = True,
    require_ranks_fit: Callable[[Recipe, int, Ranks], None] | None = None,
) -> dict[str, Any]:
    """Train the recipe in `run_dir`, from its newest checkpoint where it has one; returns the final metrics.
    `require_ranks_fit` (that of `moestro.plan`) refuses what does not fit the memory of several ranks; of one process
    it is asked here.

    The folder gets the resolved recipe and the tokenizer besides what `train` writes, and nothing before the data is
    there.

    Raises: RecipeError for impossible values, where the folder belongs to another recipe, or memory will not do.
    """
    with joined(device, recipe.parallel.build()) as ranks:
        settings, objectives, rules = build_training(recipe)
        data = build_data(recipe)
        outline = build_model(recipe, data.tokenizer.vocab_size, device="meta")
        folder = Path(run_dir)
        if ranks.main:
            # others would read what this one may already be writing anew
            require_writable(folder)
            require_same_recipe(folder, recipe)
        if ranks.several and require_ranks_fit is not None:
            require_ranks_fit(recipe, data.tokenizer.vocab_size, ranks)
        elif not ranks.several:
            where = Place(recipe.origin, ("train",))
            require_memory(outline, data.tokenizer.vocab_size, data.seq_len, settings, ranks.device, where)
        with ranks.main_first("data"):
            dataset = data.prepare(progress=show_preparation and ranks.main)
        if recipe.adapt is not None:
            require_same_tokenizer(recipe.adapt, dataset.tokenizer)

        def claim(claimed: RunFolder) -> None:
            claim_folder(claimed, recipe, dataset.tokenizer)

        with tables_in(settings.table_folder and folder / settings.table_folder):
            start = not list_checkpoints(folder / "checkpoints")
            # spread over ranks, a model need not fit one device
            place = "cpu" if ranks.several else ranks.device
            model = build_model(recipe, dataset.vocab_size, place, from_start=start)
            return train(model, dataset, settings, objectives, rules, folder, progress, claim, ranks)


def claim_folder(folder: RunFolder, recipe: Recipe, tokenizer: Tokenizer) -> None:
    """Write the resolved recipe and the tokenizer into a run folder whose lock is held; a finished run stays as it is.

    Raises: RecipeError naming the first difference where the folder belongs to another recipe; RunFolderError where it
    cannot be written.
    """
    there = require_same_recipe(folder.path, recipe)
    if there is not None and folder.result is not None:
        return
    try:
        tokenizer.save(folder.path / "tokenizer")
        forget_hashes(folder.path)
        recipe.write(folder.path / "recipe.yaml")
        record_hashes(folder.path, ["recipe.yaml"])
    except OSError as error:
        raise unwritable(folder.path, error) from error


def require_same_recipe(folder: Path, recipe: Recipe) -> Recipe | None:
    """The recipe to which a run folder belongs, None where it belongs to none yet.

    Raises: RecipeError naming the first difference from `recipe` in what decides the run. Defaults count as if they
    were written out; what is for readers (`paper`) or changes nothing that is learned (`parallel`, `FREE`) may differ.
    """
    file = folder / "recipe.yaml"
    if not file.exists():
        return None
    there = load_recipe(file)
    if difference := first_difference(_deciding(there), _deciding(recipe)):
        name, old, new = difference
        raise RecipeError(
            f"{folder} holds a run of another recipe: {name} was {old}, now {new}. Choose another folder (--out), or "
            f"continue that run: moestro train {file} --out {folder}"
        )
    return there


def _deciding(recipe: Recipe) -> dict[str, Any]:
    """What a recipe says about what is learned, defaults written out."""
    tree = {name: section for name, section in recipe.resolved.items() if name not in ("paper", "parallel")}
    return tree | {"train": {key: value for key, value in tree["train"].items() if key not in FREE}}


def first_difference(old: Any, new: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """(dotted path, old value, new value) of the first place where two trees differ; None where they are equal."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}, key=str):
            path = f"{name}.{key}" if name else str(key)
            if found := first_difference(old.get(key, "not set"), new.get(key, "not set"), path):
                return found
        return None
    return None if old == new and type(old) is type(new) else (name, old, new)

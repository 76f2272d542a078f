"""Recipes -> objects, and the whole of one training run."""

from pathlib import Path
from typing import Any

import torch

from moestro.data import TokenData
from moestro.model import Block, Transformer
from moestro.recipe.load import Recipe, load_recipe
from moestro.recipe.resolve import Place
from moestro.recipe.syntax import RecipeError
from moestro.train.loop import train
from moestro.train.progress import Display
from moestro.train.rules import Rule
from moestro.train.settings import TrainSettings
from moestro.train.step import WeightedObjectives


def build_model(recipe: Recipe, vocab_size: int, device: str | torch.device = "cpu") -> Transformer:
    """The recipe's decoder. Its weights are a function of the recipe's seed alone, on every device.

    Raises: RecipeError where a part refuses its values.
    """
    if torch.device(device).type == "meta":
        with torch.device("meta"):
            return _assemble(recipe, vocab_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.train.value("seed"))
        return _assemble(recipe, vocab_size).to(device)


def _assemble(recipe: Recipe, vocab_size: int) -> Transformer:
    plan = recipe.model
    context = {"d_model": plan.d_model}
    blocks = [
        Block(plan.d_model, plan.attention.build(context), plan.layers.get(i, plan.ffn).build(context), plan.norm_eps)
        for i in range(plan.n_layers)
    ]
    try:
        return Transformer(vocab_size, plan.d_model, blocks, plan.tie_embeddings, plan.norm_eps, plan.allow_non_causal)
    except ValueError as error:
        raise Place(recipe.origin, ("model",)).error(str(error)) from error


def build_data(recipe: Recipe) -> TokenData:
    """Corpus, tokenizer and window length; `prepare` makes the data set.

    Raises: RecipeError where a part refuses its values.
    """
    return recipe.data.build()


def build_training(recipe: Recipe) -> tuple[TrainSettings, WeightedObjectives, list[Rule]]:
    """Settings, objectives with their weights, rules.

    Raises: RecipeError where one of them refuses its values.
    """
    settings = recipe.train.build({"optim": recipe.optim.build()})
    objectives = [(name, weight, part.build()) for name, weight, part in recipe.objectives]
    return settings, objectives, [part.build() for part in recipe.rules]


def run_training(
    recipe: Recipe,
    run_dir: str | Path,
    device: str | torch.device = "cpu",
    progress: Display | None = None,
    show_preparation: bool = True,
) -> dict[str, Any]:
    """Train the recipe in `run_dir`, from its newest checkpoint where it has one; returns the final metrics.

    The folder gets the resolved recipe and the tokenizer besides what `train` writes.

    Raises: RecipeError for impossible values, or where the folder belongs to another recipe.
    """
    settings, objectives, rules = build_training(recipe)
    data = build_data(recipe)
    build_model(recipe, vocab_size=1, device="meta")
    folder = Path(run_dir)
    claim_folder(folder, recipe)
    dataset = data.prepare(progress=show_preparation)
    dataset.tokenizer.save(folder / "tokenizer")
    model = build_model(recipe, dataset.vocab_size, device)
    return train(model, dataset, settings, objectives, rules, folder, progress)


def claim_folder(folder: Path, recipe: Recipe) -> None:
    """Write the resolved recipe into a run folder, or find the same one there.

    Raises: RecipeError naming the first difference where the folder belongs to another recipe.
    """
    file = folder / "recipe.yaml"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        recipe.write(file)
        return
    there = load_recipe(file)
    if difference := first_difference(there.tree, recipe.tree):
        name, old, new = difference
        raise RecipeError(
            f"{folder} holds a run of another recipe: {name} was {old}, now {new}. Choose another folder (--out), or "
            f"continue with the recipe in {file}"
        )


def first_difference(old: Any, new: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """(dotted path, old value, new value) of the first place where two trees differ; None where they are equal."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}, key=str):
            path = f"{name}.{key}" if name else str(key)
            if found := first_difference(old.get(key, "not set"), new.get(key, "not set"), path):
                return found
        return None
    return None if old == new and type(old) is type(new) else (name, old, new)

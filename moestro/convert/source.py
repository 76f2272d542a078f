"""What is converted: a run of a dense decoder of ours, or a public dense checkpoint with text to calibrate on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moestro.convert.layers import ConversionError
from moestro.data import Dataset
from moestro.model import Transformer
from moestro.recipe.build import build_data, build_model
from moestro.recipe.evaluation import opened_run
from moestro.recipe.load import Recipe, check_recipe, load_recipe
from moestro.recipe.resolve import Origin, merge


@dataclass(frozen=True)
class Source:
    """A dense model with its weights, the recipe that makes it, and text."""

    name: str
    checkpoint: str
    recipe: Recipe
    model: Transformer
    dataset: Dataset

    @property
    def batch_size(self) -> int:
        return self.recipe.train.value("batch_size")

    @property
    def precision(self) -> str:
        return self.recipe.train.value("precision")


def open_source(path: str | Path, run: dict[str, Any], device: str, checkpoint: str = "newest") -> Source:
    """A run folder's checkpoint, or a folder in Hugging Face's format, whose text and training `run` must name.

    Raises: RecipeError for a folder that is neither, or a recipe without text; CheckpointError without an intact
    checkpoint.
    """
    folder = Path(path)
    if (folder / "config.json").is_file() and not (folder / "recipe.yaml").is_file():
        recipe = pretrained_recipe(folder, run)
        dataset = build_data(recipe).prepare()
        return Source(str(path), folder.name, recipe, build_model(recipe, dataset.vocab_size, device), dataset)
    if not folder.is_dir():
        raise ConversionError(f"{folder} is no folder: neither a run nor a public checkpoint")
    if fixed := sorted({"data", "model", "extends"} & set(run)):
        raise ConversionError(
            f"run.{fixed[0]}: a converted run keeps the model and the text of the dense run; allowed: objectives, "
            "optim, rules, train"
        )
    opened = opened_run(path, device=device, checkpoint=checkpoint)
    recipe = load_recipe(folder / "recipe.yaml")
    return Source(str(path), opened.checkpoint.name, recipe, opened.model, opened.dataset)


def pretrained_recipe(folder: Path, run: dict[str, Any]) -> Recipe:
    """A recipe whose model is the folder's, with its tokenizer, and whose text and training are those of `run`.

    Raises: ConversionError where `run` names no text; RecipeError where something in it is wrong.
    """
    if "source" not in run.get("data", {}):
        raise ConversionError(
            f"{folder}: a public checkpoint brings no text; say which: run.data.source={{kind: text, paths: FILE}} and "
            "run.data.seq_len=512, run.train.budget.steps=1000"
        )
    place = str(folder.absolute())
    tree = {
        "model": {"kind": "pretrained", "folder": place},
        "data": {"tokenizer": {"kind": "pretrained", "folder": place}, "seq_len": 512},
        "train": {"budget": {"steps": 1000}},
    }
    tree = merge(tree, run)
    return check_recipe(Recipe(tree, Origin(Path("command line"), tree)))

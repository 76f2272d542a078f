"""The inverse: a converted run -> the run folder of the dense model; and teachers dropped once training is over."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from moestro.convert.layers import ConversionError
from moestro.convert.mixture import units_of
from moestro.convert.network import Network, into_expert
from moestro.convert.run import DENSE_RECIPE, UNITS, require_new, write_run
from moestro.layers import MoELayer
from moestro.recipe.build import build_model
from moestro.recipe.evaluation import opened_run
from moestro.recipe.load import Recipe, check_recipe, load_recipe
from moestro.recipe.resolve import Origin, copy_tree


def restore_dense(source: str | Path, out: str | Path, checkpoint: str = "newest") -> list[int]:
    """Gather every unit of the dense networks from the experts of a converted run, trained since or not, and write
    `out`, a run folder of the dense model at step 0; returns the blocks. Without training in between, every weight is
    what it was, to the last bit.

    Raises: ConversionError for a run that was not converted, or units that no expert kept.
    """
    require_new(Path(out))
    folder = Path(source)
    if not (folder / UNITS).is_file():
        raise ConversionError(f"{folder} holds no {UNITS}: it was not made by moestro convert")
    run = opened_run(source, checkpoint=checkpoint)
    recipe = load_recipe(folder / DENSE_RECIPE)
    dense = build_model(recipe, run.dataset.vocab_size)
    rows = _rows(folder / UNITS)
    places = tuple(f"blocks.{index}.ffn." for index in rows)
    others = {name: value for name, value in run.model.state_dict().items() if not name.startswith(places)}
    found = dense.load_state_dict(others, strict=False)
    if lost := [*found.unexpected_keys, *(name for name in found.missing_keys if not name.startswith(places))]:
        raise ConversionError(f"{folder}: {DENSE_RECIPE} and the run do not fit: {lost[0]} is in one of them alone")
    for index, where in rows.items():
        layer: Any = run.model.blocks[index]
        target: Any = dense.blocks[index]
        into_expert(gathered(index, student_of(layer.ffn), where), target.ffn.expert)
    write_run(Path(out), recipe, dense, run.dataset, lambda folder: None)
    return sorted(rows)


def _rows(file: Path) -> dict[int, Tensor]:
    try:
        return {int(name): tensor for name, tensor in load_file(file).items()}
    except SafetensorError as error:
        raise ConversionError(f"{file} is damaged: {error}") from error


def student_of(layer: Any) -> MoELayer:
    """The mixture of a converted layer, with its teacher or without."""
    return layer if isinstance(layer, MoELayer) else layer.student


def gathered(index: int, layer: MoELayer, rows: Tensor) -> Network:
    """The dense network of which a layer has the units at `rows`.

    Raises: ConversionError where some are nowhere.
    """
    lost = int((rows < 0).sum())
    if lost:
        raise ConversionError(f"layer {index}: {lost} of {len(rows)} units were re-initialised in every expert")
    units = units_of(layer)
    if int(rows.max()) >= units.width:
        raise ConversionError(f"layer {index}: training changed its experts, {units.width} units are left")
    return units.take(rows)


def drop_teachers(source: str | Path, out: str | Path, checkpoint: str = "newest") -> list[int]:
    """Write `out`, a run folder at step 0 of the same model without the frozen teachers of its layers and without the
    objective that asks them; returns the blocks that had one.

    Raises: ConversionError where there are none.
    """
    require_new(Path(out))
    run = opened_run(source, checkpoint=checkpoint)
    recipe = load_recipe(Path(source) / "recipe.yaml")
    tree = copy_tree(recipe.resolved)
    nodes: Mapping[int, dict] = tree["model"]["layers"]
    taught = [index for index, node in nodes.items() if node["kind"] == "taught"]
    if not taught:
        raise ConversionError(f"{source}: no layer has a teacher")
    for index in taught:
        student = tree["model"]["layers"][index]["student"]
        tree["model"]["layers"][index] = {**student, "record": None}
    tree["objectives"] = [node for node in tree["objectives"] if node["kind"] != "router_target"]
    without = check_recipe(Recipe(tree, Origin(Path(out) / "recipe.yaml", tree)))
    model = build_model(without, run.dataset.vocab_size)
    model.load_state_dict(dict(_without_teachers(run.model.state_dict(), taught)))
    write_run(Path(out), without, model, run.dataset, lambda folder: None)
    return sorted(taught)


def _without_teachers(weights: Mapping[str, torch.Tensor], taught: list[int]):
    for name, value in weights.items():
        for index in taught:
            name = name.replace(f"blocks.{index}.ffn.student.", f"blocks.{index}.ffn.")
        if not any(name.startswith(f"blocks.{index}.ffn.teacher.") for index in taught):
            yield name, value

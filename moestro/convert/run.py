"""A dense model -> a run folder of a mixture that `moestro train` goes on with."""

import math
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors.torch import save_file
from torch import nn

from moestro.convert.layers import ConversionError, Converted, Site, convert_layers, every_expert, warning_of
from moestro.convert.network import Network, into_expert, of_expert
from moestro.convert.plan import Conversion
from moestro.convert.source import Source, open_source
from moestro.data import Batch, Dataset
from moestro.evaluate import evaluate
from moestro.layers import DenseFFN, MoELayer
from moestro.model import Transformer
from moestro.recipe.build import build_model, build_training, claim_folder
from moestro.recipe.load import Recipe, check_recipe
from moestro.recipe.resolve import Origin, copy_tree, merge
from moestro.train.folder import RunFolder, require_writable
from moestro.train.folder_job import FolderJob, clear_finished, lies_in
from moestro.train.start import write_start

# Files of a converted run besides those of every run: the figures, the dense recipe, where its units lie.
REPORT, DENSE_RECIPE, UNITS = "convert.json", "dense.yaml", "units.safetensors"
# Held-out tokens on which the model is measured before and after.
MEASURED = 32_768


def convert_run(
    source: str | Path,
    out: str | Path,
    conversion: Conversion,
    device: str = "cpu",
    checkpoint: str = "newest",
    held_out: int = MEASURED,
) -> dict[str, Any]:
    """Convert the dense layers of a run's checkpoint, or of a public model, and write `out`, a run folder at step 0;
    returns the report, which is also in its convert.json.

    Raises: RecipeError for a folder that is neither or a recipe that does not fit; ConversionError where nothing is to
    be converted or a layer is not what it should be; CheckpointError without an intact checkpoint.
    """
    require_new(Path(out), Path(source))
    dense = open_source(source, conversion.run, device, checkpoint)
    sites = dense_sites(dense.model, conversion.layers)
    before = evaluate(dense.model, dense.dataset.val_batches(dense.batch_size, held_out), precision=dense.precision)
    batches = partial(calibration, dense.dataset, dense.batch_size, conversion)
    made = list(convert_layers(dense.model, sites, conversion, batches, dense.precision))
    recipe = converted_recipe(dense.recipe, made, conversion, Path(out))
    model = assembled(recipe, dense, made, device)
    report = {
        "source": dense.name,
        "checkpoint": dense.checkpoint,
        "layers": [one.figures for one in made],
        "warning": warning_of(made[0].mixture.node, recipe.resolved["objectives"]),
        "loss": {"dense": before["loss"], **losses(model, made, dense, held_out)},
    }
    if report["warning"]:
        warnings.warn(report["warning"], stacklevel=2)
    units = {str(one.site.index): one.mixture.rows for one in made}
    add = partial(_add_files, report=report, dense=dense.recipe, units=units)
    write_run(Path(out), recipe, model, dense.dataset, add)
    return report


def dense_sites(model: Transformer, layers: tuple[int, ...] | None) -> list[Site]:
    """The dense layers of a decoder, all or those of the blocks that are named.

    Raises: ConversionError where there are none, or one named is not dense.
    """
    blocks: list[Any] = list(model.blocks)
    dense = [index for index, block in enumerate(blocks) if isinstance(block.ffn, DenseFFN)]
    if not dense:
        raise ConversionError("no block of the model has a dense feed-forward layer, so that nothing can be converted")
    chosen = dense if layers is None else list(layers)
    if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(dense):
        raise ConversionError(
            f"layers={chosen}, allowed: some of {dense}, the blocks with a dense feed-forward layer, each once"
        )

    def put(index: int, layer: nn.Module) -> None:
        blocks[index].ffn = layer

    return [
        Site(index, blocks[index].ffn, of_expert(blocks[index].ffn.expert), partial(put, index)) for index in chosen
    ]


def calibration(dataset: Dataset, batch_size: int, conversion: Conversion) -> Iterator[Batch]:
    """The training batches that calibration reads, none of them twice."""
    tokens = min(conversion.tokens, dataset.n_train_tokens)
    for step in range(math.ceil(tokens / (batch_size * dataset.seq_len))):
        yield dataset.train_batch(step, batch_size, conversion.seed)


def converted_recipe(dense: Recipe, made: list[Converted], conversion: Conversion, out: Path) -> Recipe:
    """The dense recipe with the converted layers in their blocks, and what the conversion says of the run.

    Raises: RecipeError where that is no recipe.
    """
    tree = copy_tree(dense.resolved)
    for one in made:
        index, node = one.site.index, one.mixture.node
        if conversion.taught:
            student = {**node, "record": {"kind": "all"}}
            node = {"kind": "taught", "student": student, "teacher": teacher_node(one.site.network)}
        tree["model"]["layers"][index] = node
    tree = merge(tree, conversion.run)
    objectives = tree["objectives"] if isinstance(tree["objectives"], list) else []
    kinds = [node.get("kind") for node in objectives if isinstance(node, dict)]
    if not conversion.taught and "router_target" in kinds:
        message = "objectives: router_target learns from dense layers, which nothing keeps; allowed: with taught: true"
        raise ConversionError(message)
    return check_recipe(Recipe(tree, Origin(out / "recipe.yaml", tree)))


def teacher_node(network: Network) -> dict[str, Any]:
    """The recipe's node of the dense layer."""
    bias = network.biased or network.out_bias is not None
    kind = {"activation": network.activation, "glu": network.glu, "bias": bias}
    return {"kind": "dense", "width": network.width, **kind}


def teacher_weights(network: Network) -> dict[str, torch.Tensor]:
    """The dense layer's parameters by their names in it."""
    arguments = {key: value for key, value in teacher_node(network).items() if key != "kind"}
    layer = DenseFFN(network.d_model, **arguments).to(network.up)
    into_expert(network, layer.expert)
    return layer.state_dict()


def assembled(recipe: Recipe, dense: Source, made: list[Converted], device: str) -> Transformer:
    """The converted model: the dense model's other weights, the new layers' own, teachers where there are any."""
    model = build_model(recipe, dense.dataset.vocab_size, device)
    weights = dict(dense.model.state_dict())
    for one in made:
        place = f"blocks.{one.site.index}.ffn."
        new: Any = model.blocks[one.site.index]
        inside = "" if isinstance(new.ffn, MoELayer) else "student."
        taught = teacher_weights(one.site.network) if inside else {}
        teacher = {f"{place}teacher.{name}": value for name, value in taught.items()}
        layer = {f"{place}{inside}{name}": value for name, value in one.mixture.layer.state_dict().items()}
        weights = {name: value for name, value in weights.items() if not name.startswith(place)} | layer | teacher
    model.load_state_dict(weights)
    return model


def losses(model: Transformer, made: list[Converted], dense: Source, held_out: int) -> dict[str, float]:
    """Held-out loss of the converted model and, where that should be the dense one's, with all experts."""

    def measured() -> float:
        batches = dense.dataset.val_batches(dense.batch_size, held_out)
        return evaluate(model, batches, precision=dense.precision)["loss"]

    found = {"converted": measured()}
    if made[0].mixture.exact == "all":
        with every_expert(model.moe_layers()[name] for name in _names(model, made)):
            found["all_experts"] = measured()
    return found


def _names(model: Transformer, made: list[Converted]) -> list[str]:
    indices = {str(one.site.index) for one in made}
    return [name for name in model.moe_layers() if name.split(".")[1] in indices]


def write_run(out: Path, recipe: Recipe, model: Transformer, dataset: Dataset, add: Any) -> None:
    """A run folder at step 0, which appears whole or not at all; `add` is called with it to add files."""
    settings, objectives, rules = build_training(recipe)

    def claim(folder: RunFolder) -> None:
        claim_folder(folder, recipe, dataset.tokenizer)
        add(folder)

    # a job of its own every time: nothing that an interrupted conversion left is kept
    with FolderJob(out, {"conversion": uuid4().hex}) as job:
        write_start(model, dataset, settings, objectives, rules, job.path, claim)
        job.publish()


def require_new(out: Path, source: Path | None = None) -> None:
    """Raises: ConversionError where there is something at `out`, or it lies in the public checkpoint `source`;
    RunFolderError where it cannot be written."""
    if source is not None and (source / "config.json").is_file() and lies_in(out, source):
        raise ConversionError(f"{out} lies in {source}, which is only read: choose another folder")
    require_writable(out)
    if out.exists() and any(out.iterdir()):
        clear_finished(out)
        raise ConversionError(f"{out} is not empty: choose another folder")


def _add_files(folder: RunFolder, report: dict[str, Any], dense: Recipe, units: dict[str, torch.Tensor]) -> None:
    folder.write_json(REPORT, report)
    dense.write(folder.path / DENSE_RECIPE)
    save_file({name: rows.contiguous() for name, rows in units.items()}, folder.path / UNITS)

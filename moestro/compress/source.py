"""What is compressed: a folder of the Hugging Face format, or a run of our own, exported or not, through the same few
questions."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from moestro.compress.applied import layer_number
from moestro.compress.plan import PlanError
from moestro.data import Tokenizer, load_tokenizer
from moestro.formats import Checkpoint
from moestro.layers.moe import MoELayer
from moestro.model import Transformer
from moestro.model.active import total_parameters
from moestro.ops.whole_files import TEMPORARY, holding, record_hashes
from moestro.recipe.build import build_model
from moestro.recipe.evaluation import CHECKPOINTS
from moestro.recipe.load import Recipe, load_recipe
from moestro.recipe.pretrained import Pretrained
from moestro.routers import BiasedRouter, ScoredRouter
from moestro.train import load_weights
from moestro.train.checkpoint import read_state, step_of, write_checkpoint
from moestro.train.durable import empty, publish_folder, write_json, write_text
from moestro.train.folder_job import FolderInUse
from moestro.train.tensors import model_tensors

MODEL_TYPE = "moestro"


@dataclass(frozen=True)
class Kind:
    """Of what a folder is, as `formats.Family` says it."""

    model_type: str = MODEL_TYPE


@dataclass(frozen=True)
class RunSource:
    """A run's newest checkpoint. Layers are blocks of the decoder; nothing but headers and routers is read.

    Raises: PlanError where a block has more than one mixture, or one that a public checkpoint came with.
    """

    path: Path
    family: Kind = Kind()
    extra_layers: tuple[int, ...] = ()

    @cached_property
    def recipe(self) -> Recipe:
        """What the run was trained by."""
        return load_recipe(self.path / "recipe.yaml")

    @cached_property
    def checkpoint(self) -> Path:
        """The folder of the newest checkpoint."""
        return CHECKPOINTS["newest"](self.path)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The run's own."""
        return load_tokenizer(self.path / "tokenizer")

    @cached_property
    def model(self) -> Transformer:
        """The decoder without weights."""
        return build_model(self.recipe, self.tokenizer.vocab_size, "meta")

    @property
    def config_file(self) -> Path:
        """The file that says what the model is."""
        return self.path / "recipe.yaml"

    @property
    def record_file(self) -> Path:
        """The file that says which weights it has."""
        return self.checkpoint / "state.json"

    @property
    def weights(self) -> tuple[Path, ...]:
        """The files that hold them."""
        return (self.checkpoint / "model.safetensors",)

    @property
    def step(self) -> int:
        """Steps of training."""
        return step_of(self.checkpoint)

    @property
    def counters(self) -> dict[str, Any]:
        """What training counted."""
        return read_state(self.checkpoint)["counters"]

    def loaded(self) -> Transformer:
        """The decoder with the checkpoint's weights."""
        model = build_model(self.recipe, self.tokenizer.vocab_size)
        load_weights(model, self.checkpoint)
        return model

    @property
    def mixtures(self) -> dict[int, tuple[str, MoELayer]]:
        """{block: name and layer} of the mixtures of feed-forward experts whose router has a row for every expert.

        Raises: PlanError where there are none, or several in a block.
        """
        return self._all_mixtures[0]

    @property
    def others(self) -> list[str]:
        """All other mixtures, which stay as they are, each with the reason."""
        return self._all_mixtures[1]

    @cached_property
    def _all_mixtures(self) -> tuple[dict[int, tuple[str, MoELayer]], list[str]]:
        found: dict[int, tuple[str, MoELayer]] = {}
        others = []
        for name, layer in self.model.moe_layers().items():
            number = layer_number(name)
            if self._came(number):
                raise PlanError(f"block {number}: {came_with(self)}")
            if not isinstance(layer.router, ScoredRouter | BiasedRouter):
                others.append(f"{name}: {type(layer.router).__name__} has no rows of experts; allowed: scored, biased")
            elif bank_node(self.layer_node(number), layer) is None:
                others.append(f"{name}: only mixtures {{kind: moe}} of feed-forward experts {{kind: ffn}}")
            elif number in found:
                raise PlanError(f"block {number} has several mixtures, allowed: one ({self.path})")
            else:
                found[number] = (name, layer)
        if others and not found:
            raise PlanError(others[0])
        if not found:
            raise PlanError(f"the model of {self.path} has no experts")
        return found, others

    def layer_node(self, block: int) -> dict[str, Any]:
        """What the resolved recipe says of a block's layer."""
        model = self.recipe.resolved["model"]
        return model["layers"].get(block, model["ffn"])

    def _came(self, block: int) -> bool:
        """Whether a block has the layer that a public checkpoint came with: no recipe describes it."""
        plan = self.recipe.model
        return isinstance(plan, Pretrained) and plan.ffn is None and block not in plan.layers

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Blocks with experts."""
        return tuple(self.mixtures)

    def n_experts(self, layer: int) -> int:
        """Experts of a block."""
        return self.mixtures[layer][1].router.n_experts

    def widths(self, layer: int) -> list[int]:
        """Hidden units of every expert of a block."""
        return [int(width) for width in self.mixtures[layer][1].bank.row_widths().tolist()]  # type: ignore[union-attr]

    def router_tensors(self, layer: int) -> dict[str, str]:
        """{"weight": its name} of a block's router."""
        return {"weight": f"{self.mixtures[layer][0]}.router.score.weight"}

    def read(self, name: str) -> Tensor:
        """One tensor of the checkpoint."""
        with safe_open(self.checkpoint / "model.safetensors", framework="pt") as file:
            return file.get_tensor(name)

    def write(self, model: nn.Module, recipe: Recipe, texts: Mapping[str, str], destination: Path) -> Path:
        """A finished run of this model by this recipe, its tokenizer and step those of this one, with these files
        beside; complete or not there at all.

        Raises: FolderInUse where another process writes it.
        """
        with holding(destination.with_name(TEMPORARY + destination.name), FolderInUse(destination)) as temporary:
            empty(temporary)
            write_run(self, model, recipe, temporary)
            for name, text in texts.items():
                write_text(temporary / name, text)
            publish_folder(temporary, destination)
        return destination


def write_run(source: RunSource, model: nn.Module, recipe: Recipe, folder: Path) -> None:
    """The files of a run that is over: it has no optimizer state to train on with."""
    tensors, tied = model_tensors(model)
    state = {"tied": tied, "counters": source.counters}
    write_checkpoint(folder / "checkpoints", source.step, {"model": tensors}, state)
    source.tokenizer.save(folder / "tokenizer")
    recipe.write(folder / "recipe.yaml")
    write_json(folder / "done.json", {"compressed": True, "params_total": total_parameters(model)})
    record_hashes(folder, ["recipe.yaml", "done.json"])


def open_source(path: Path) -> Checkpoint | RunSource:
    """A run folder (it has a recipe), a run's export in our own layout, or a Hugging Face folder.

    Raises: PlanError for a family that has to be translated first, and a run that has to be exported first.
    """
    if (path / "recipe.yaml").is_file():
        run = RunSource(path)
        if isinstance(run.recipe.model, Pretrained) and not (run.recipe.model.layers or run.recipe.model.ffn):
            raise PlanError(came_with(run))
        return run
    found = Checkpoint(path)
    if found.config.get("model_type") == MODEL_TYPE:
        # which needs transformers
        from moestro.compress.exported import ExportedSource

        return ExportedSource(path)
    if found.config.get("model_type") == "deepseek":
        raise PlanError(
            f"{path} is DeepSeek-MoE 16B, whose own code no longer loads: write it as the family it equals "
            f"first (moestro compress {path} DST --translate)"
        )
    return found


def came_with(run: RunSource) -> str:
    """The refusal of mixtures that a pretrained model came with, which no recipe can describe made smaller."""
    return (
        f"{run.path} trains the experts that a public checkpoint came with: export the run (moestro export {run.path} "
        "--out FOLDER), and compress that folder"
    )


def bank_node(node: dict[str, Any], layer: MoELayer) -> dict[str, Any] | None:
    """Of what a recipe says of a mixture, what it says of its experts; None where these are no feed-forward ones, or in
    another kind of layer, so that no recipe can list their widths."""
    if node.get("kind") != "moe" or len(layer.banks()) != 1:
        return None
    found = node["branches"][[branch is layer.bank for branch in layer.branches].index(True)]
    return found if found.get("kind") == "ffn" else None


def choice_of(layer: MoELayer) -> Any:
    """What of a layer chooses experts, and may have `top_k` and `limit`: a scored router's selection, or the router."""
    return layer.router.select if isinstance(layer.router, ScoredRouter) else layer.router

"""Runs of pretrained models: back into the folder they came from, name by name, with the weights that they have now."""

import hashlib
import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from moestro.data import load_tokenizer
from moestro.export.card import ORIGINAL_CARD, Base, Facts, card
from moestro.export.tensors import ExportError, cast
from moestro.export.tokenizers import fast_tokenizer, save_tokenizer
from moestro.formats import Checkpoint
from moestro.formats.writer import Outgoing, computed, of_file, of_tensor
from moestro.hf.load import skeleton
from moestro.model.active import total_parameters
from moestro.recipe.build import build_model
from moestro.recipe.importing import COPY, MANIFEST, files_of
from moestro.recipe.load import Recipe
from moestro.recipe.pretrained import pretrained_tokenizer
from moestro.train import load_weights
from moestro.train.checkpoint import read_state
from moestro.train.durable import write_json

# DeepSeek's correction of choices, which everything that reads it keeps as wide as it is.
WIDE = "e_score_correction_bias"
CARD = "README.md"


class PretrainedContents:
    """What goes into the folder of a run of a pretrained model: its files as they are, config.json changed where the
    dtype is another, and every tensor under the name, and of the shape, that it has there. `checkpoint` None: nothing
    was trained, and tensors are copied byte for byte.

    Raises: ExportError where a layer is no longer transformers' own; FormatError, CheckpointError for damaged folders.
    """

    def __init__(self, recipe: Recipe, run: Path, checkpoint: Path | None, dtype: torch.dtype | None) -> None:
        self.plan: Any = recipe.model
        self.recipe, self.run, self.dtype = recipe, run, dtype
        self.source = Checkpoint(self.plan.folder)
        self.step, self.weights, self.causal = 0, _identity(self.source), True
        self.trained = checkpoint is not None
        own: dict[str, Tensor] = {}
        if checkpoint is None:
            self._describe(self._untouched())
        else:
            state = read_state(checkpoint)
            self.step, self.weights = state["step"], state["sha256"]["model.safetensors"]
            own = self._trained(checkpoint)
        self.config = _dtype_stated(self.source.config, self._stated_dtype())
        self.tensors = [self._outgoing(name, own.get(name)) for name in sorted(self.source.names())]

    def _describe(self, decoder: PreTrainedModel) -> None:
        self.architecture, self.n_parameters = type(decoder).__name__, total_parameters(decoder)

    def _untouched(self) -> PreTrainedModel:
        plan = self.plan
        if plan.ffn or plan.layers or self.recipe.adapt:
            raise ExportError(f"{self.run}: its recipe puts other layers into {plan.folder}, none of them trained yet")
        return skeleton(plan.folder)

    def _trained(self, checkpoint: Path) -> dict[str, Tensor]:
        model: Any = build_model(self.recipe, load_tokenizer(self.run / "tokenizer").vocab_size)
        load_weights(model, checkpoint)
        try:
            with model.stock() as decoder:
                # behind this block its feed-forward layers are ours again, and not among its parameters
                self._describe(decoder)
                return on_disk(decoder, self.source)
        except ValueError as error:
            raise ExportError(f"{self.run}: {error}. No stock architecture has such a layer") from error

    def _stated_dtype(self) -> torch.dtype | None:
        """The dtype that config.json is to state; None: what it states now."""
        return self.dtype or (getattr(torch, self.plan.dtype) if self.trained else None)

    def _outgoing(self, name: str, tensor: Tensor | None) -> Outgoing:
        entry, stored = self.source.shards[name], self.source.dtype(name)
        found = stored if tensor is None else tensor.dtype
        kept = not found.is_floating_point or name.endswith(WIDE)
        wanted = found if kept or self.dtype is None else self.dtype
        if wanted == found:
            return of_file(name, self.source.path, entry) if tensor is None else of_tensor(name, tensor)
        read = partial(self.source.read, name) if tensor is None else partial(_itself, tensor)
        return computed(name, wanted, entry.shape, partial(cast, name, read, wanted))

    def companions(self, path: Path, facts: Facts) -> None:
        """Everything but weights: what lies beside them in the folder, and a card; its own card gets another name."""
        shards = {self.source.file_of(name) for name in self.source.names()}
        for name in files_of(self.source):
            if name not in shards and not name.endswith(".safetensors.index.json"):
                content = (self.source.path / name).read_bytes()
                (path / (ORIGINAL_CARD if name == CARD else name)).write_bytes(content)
        if self.config != self.source.config:
            write_json(path / "config.json", self.config)
        if not self._has_its_tokenizer():
            length = self.recipe.data.value("seq_len")
            save_tokenizer(fast_tokenizer(self.run / "tokenizer", length), path)
        (path / CARD).write_text(card(self.recipe, facts, self._base()), encoding="utf-8")

    def verify(self, path: Path) -> None:
        """Nothing: names and shapes are the folder's, and every tensor of the model is written."""

    def _has_its_tokenizer(self) -> bool:
        """Whether the run's tokens are those of the folder."""
        try:
            there = pretrained_tokenizer(self.source.path).fingerprint()
        except (FileNotFoundError, ValueError):
            return False
        return there == load_tokenizer(self.run / "tokenizer").fingerprint()

    def _base(self) -> Base:
        # a copy that an import made lies beside what names its source
        folder = self.plan.folder
        manifest = folder.parent / MANIFEST
        copied = folder.name == COPY and manifest.is_file()
        origin = json.loads(manifest.read_text(encoding="utf-8"))["source"] if copied else folder
        return Base(Path(origin).name, self.source.config["model_type"], self.trained, licence_of(self.source.path))


def on_disk(decoder: PreTrainedModel, source: Checkpoint) -> dict[str, Tensor]:
    """The decoder's tensors under the names that a folder has for them. Layers beyond the decoder's last, which predict
    further tokens, are not among them.

    Raises: ExportError where the folder has no name, or another shape, for a tensor of the decoder.
    """
    state = revert_weight_conversion(decoder, decoder.state_dict())
    # some folders are of the decoder without its head, and leave out what stands before every name
    prefix, there = f"{decoder.base_model_prefix}.", set(source.names())
    short = {name: name.removeprefix(prefix) for name in state if name not in there}
    found = {short[name] if short.get(name) in there else name: tensor for name, tensor in state.items()}
    written = {tensor.data_ptr() for name, tensor in found.items() if name in there}
    for name, tensor in found.items():
        if name not in there and tensor.data_ptr() not in written:
            raise ExportError(f"{source.path} has no tensor {name}, which the model has")
        if name in there and tuple(tensor.shape) != source.shape(name):
            raise ExportError(f"{source.path}: {name} is {source.shape(name)}, the model's {tuple(tensor.shape)}")
    return {name: tensor for name, tensor in found.items() if name in there}


def _identity(source: Checkpoint) -> str:
    """Of a folder's weights: another one where a file was written since."""
    return hashlib.sha256(json.dumps(files_of(source), sort_keys=True).encode()).hexdigest()


def _dtype_stated(config: Mapping[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """config.json with the dtype of its weights, under the key that it has; all else stays as it is: what a class of
    another version would write, older ones misread."""
    if dtype is None:
        return dict(config)
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    return {**config, key: str(dtype).removeprefix("torch.")}


def licence_of(folder: Path) -> str | None:
    """What the header of a folder's card says; None where there is none."""
    file = folder / CARD
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    header = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    said = re.search(r"^license:[ \t]*['\"]?([\w.+-]+)", header[1], re.MULTILINE) if header else None
    return said[1] if said else None


def _itself(tensor: Tensor) -> Tensor:
    return tensor

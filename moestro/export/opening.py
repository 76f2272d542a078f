"""Models to use: a run's folder, an exported one, or any causal language model in Hugging Face's format."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from moestro import __version__
from moestro.data import load_tokenizer
from moestro.export.configuration import MoestroConfig
from moestro.export.construction import construction
from moestro.export.exported import stored_configuration
from moestro.export.modeling import MoestroForCausalLM, stays_wide
from moestro.export.tokenizers import fast_tokenizer
from moestro.formats.shards import Shards
from moestro.ops.whole_files import require_intact
from moestro.recipe.build import build_model
from moestro.recipe.evaluation import CHECKPOINTS, turned_recipe, untrained
from moestro.recipe.load import Recipe
from moestro.recipe.pretrained import Pretrained
from moestro.recipe.syntax import RecipeError
from moestro.train import load_weights
from moestro.upgrades import EXPORT


class Opened(NamedTuple):
    """A model in evaluation mode, and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def open_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    checkpoint: str = "newest",
    trust_remote_code: bool = False,
    settings: Sequence[str] = (),
) -> Opened:
    """The model in a folder: a run's `newest` or `best` checkpoint, or a folder that `from_pretrained` loads. `dtype`
    is that of the weights, where None what the folder keeps. Code that lies in a folder runs only with
    `trust_remote_code`; exported folders need none here. `settings` give the tokens of a run other numbers of experts
    than it was trained with: `model.ffn.router.select.top_k=1`, or a `threshold`.

    Raises: FileNotFoundError where there is no folder, RecipeError where it holds neither, or settings that are none of
    a run's; CheckpointError where a run has no intact checkpoint; VersionError where a newer moestro wrote the folder;
    DamagedFile where a file is not what its hash in hashes.json says; FormatError for weights that are damaged or
    outside of it; OSError and ValueError as transformers has them.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    require_intact(folder)
    if (folder / "recipe.yaml").is_file():
        return open_run(folder, device, dtype, checkpoint, settings)
    if not (folder / "config.json").is_file():
        raise RecipeError(f"{folder} holds no model: neither recipe.yaml (a run) nor config.json (Hugging Face)")
    _refuse(settings, f"{folder} is no run of moestro")
    said: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    if (own := stored_configuration(folder / "config.json")) is not None:
        said["config"] = own
    # no pickle, which may run code, and no file outside of the folder
    Shards(folder)
    weights: dict[str, Any] = {"dtype": "auto" if dtype is None else dtype, "use_safetensors": True}
    model = AutoModelForCausalLM.from_pretrained(folder, **weights, **said)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    return _opened(model, tokenizer, device)


def _opened(model: nn.Module, tokenizer: PreTrainedTokenizerBase, device: str | torch.device) -> Opened:
    return Opened(model.to(device).eval(), tokenizer)  # type: ignore[arg-type]


def _refuse(settings: Sequence[str], why: str) -> None:
    if settings:
        raise RecipeError(f"{settings[0]!r} cannot be set: {why} (--set)")


def open_run(
    folder: Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    checkpoint: str = "newest",
    settings: Sequence[str] = (),
) -> Opened:
    """A run's checkpoint as a transformers model; that of a pretrained model is the decoder it came from.

    Raises: as `open_model`.
    """
    recipe = turned_recipe(folder, settings)
    if isinstance(recipe.model, Pretrained):
        _refuse(settings, "the decoder of a pretrained model has numbers of experts of its own")
        return _open_pretrained(recipe, folder, device, dtype, checkpoint)
    path = CHECKPOINTS[checkpoint](folder)
    own = load_tokenizer(folder / "tokenizer")
    model = MoestroForCausalLM(configured(recipe, own.vocab_size))
    load_weights(model.decoder, path)
    tokenizer = fast_tokenizer(folder / "tokenizer", recipe.data.value("seq_len"))
    model.generation_config = GenerationConfig(
        eos_token_id=own.eos_id, pad_token_id=own.eos_id, use_cache=model.decoder.causal
    )
    return _opened(in_dtype(model, dtype or torch.float32), tokenizer, device)


def _open_pretrained(
    recipe: Recipe, folder: Path, device: str | torch.device, dtype: torch.dtype | None, checkpoint: str
) -> Opened:
    model: Any = build_model(recipe, load_tokenizer(folder / "tokenizer").vocab_size)
    if untrained(recipe, folder) is None:
        load_weights(model, CHECKPOINTS[checkpoint](folder))
    tokenizer = fast_tokenizer(folder / "tokenizer", recipe.data.value("seq_len"))
    decoder = model.release()
    return _opened(decoder if dtype is None else in_dtype(decoder, dtype), tokenizer, device)


def in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The same model, its floating-point tensors in `dtype`, but for those that stay in float32 (`stays_wide`)."""
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_floating_point():
            wide = stays_wide(name, tensor) and dtype.itemsize < 4
            tensor.data = tensor.data.to(torch.float32 if wide else dtype)
    model.config.dtype = dtype
    return model


def configured(recipe: Recipe, vocab_size: int) -> MoestroConfig:
    """The configuration of a recipe's model.

    Raises: RecipeError where a part refuses its values.
    """
    made_of, length = construction(recipe, vocab_size), recipe.data.value("seq_len")
    return MoestroConfig(made_of, recipe.resolved, __version__, length, EXPORT.version, dtype="float32")

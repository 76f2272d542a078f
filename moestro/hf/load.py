"""Stock models from folders, checked before anything large is read."""

import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moestro.formats import DENSE_FAMILIES, FAMILIES, Checkpoint, FormatError
from moestro.formats.complete import COUNTS_BY_LAYER
from moestro.hf.whole import stored_tensors

# nothing is fetched, and nothing in a folder is run
OF_FOLDER = {"local_files_only": True, "trust_remote_code": False}


def load(
    folder: str | Path,
    experts: str | None = None,
    attention: str | None = None,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model of a folder of a known family, for evaluation; the same tensors and logits as
    `AutoModelForCausalLM.from_pretrained`.

    The folder is checked first (`moestro.formats`): nothing missing, no gaps between experts, config.json and tensors
    agree. Layers beyond the last, which predict further tokens, are left out with a warning. `experts` is how
    transformers computes experts: eager, grouped_mm, batched_mm, moestro; its own default where None. `attention`
    likewise. `dtype` is the folder's own unless given. Nothing is ever fetched. Code that lies in the
    folder runs only with `trust_remote_code`, and then a folder of any family is taken as it is.

    Raises: FormatError for a folder that is missing, damaged, incomplete or of an unknown family; ValueError for an
    unknown `experts`.
    """
    if experts not in (None, "eager") and experts not in ALL_EXPERTS_FUNCTIONS:
        raise ValueError(f"experts={experts!r}, allowed: eager, {', '.join(ALL_EXPERTS_FUNCTIONS.valid_keys())}")
    checked(folder, trust_remote_code)
    given = {"experts_implementation": experts, "attn_implementation": attention}
    return strictly(folder, device, trust_remote_code, dtype, **given)


def strictly(
    folder: str | Path,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    dtype: torch.dtype | str = "auto",
    **given: str | None,
) -> PreTrainedModel:
    """The model of a folder that transformers knows, of whatever form (quantised, with code of its own): no tensor may
    be missing, left over or of another shape. `given` goes to transformers, where it is not None.

    Raises: FormatError.
    """
    with usable(Path(folder)):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            Path(folder),
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            # a pickle may run code when it is read
            use_safetensors=True,
            output_loading_info=True,
            # told apart from other errors below
            ignore_mismatched_sizes=True,
            **{name: value for name, value in given.items() if value is not None},
        )
    model, found = loaded
    found["unexpected_keys"] = _without_extra_layers(found["unexpected_keys"], model.config)
    for what in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if found[what]:
            raise FormatError(f"{folder}: {what.replace('_', ' ')} for {type(model).__name__}: {_few(found[what])}")
    return model.to(device)


def checked(folder: str | Path, trust_remote_code: bool = False) -> Checkpoint:
    """The folder, once it is known to be complete and of a known family.

    Raises: FormatError.
    """
    checkpoint = Checkpoint(folder)
    kind = checkpoint.config.get("model_type")
    if kind in FAMILIES:
        _require_stated(checkpoint)
    elif kind not in DENSE_FAMILIES and not trust_remote_code:
        code = " It asks for code of its own (auto_map)." if "auto_map" in checkpoint.config else ""
        allowed = ", ".join([*FAMILIES, *DENSE_FAMILIES])
        raise FormatError(f"{checkpoint.path / 'config.json'}: model_type {kind!r}, allowed: {allowed}.{code}")
    return checkpoint


def _require_stated(checkpoint: Checkpoint) -> None:
    """Raises: FormatError where config.json leaves the number of experts to transformers, which then assumes another
    one, or a token wants more experts than there are, which only shows when the model runs."""
    family, file = checkpoint.family, checkpoint.path / "config.json"
    keys = " or ".join(family.count_keys)
    if not checkpoint.moe_layers:
        return
    if not any(key in checkpoint.config for key in (*family.count_keys, COUNTS_BY_LAYER)):
        raise FormatError(f"{file} does not say how many experts there are ({keys})")
    fewest = min(checkpoint.n_experts(layer) for layer in checkpoint.moe_layers)
    if checkpoint.top_k > fewest:
        raise FormatError(f"{file}: {family.top_k_key}={checkpoint.top_k}, but a layer has {fewest} experts")


def _without_extra_layers(names: Iterable[str], config: Any) -> list[str]:
    """The names without those of layers that predict further tokens, which transformers drops."""
    extra = [name for name in names if config.num_hidden_layers <= _layer_of(name) < _all_layers(config)]
    if extra:
        warnings.warn(f"transformers drops {len(extra)} tensors of extra layers: {_few(extra)}", stacklevel=3)
    return [name for name in names if name not in extra]


def _layer_of(name: str) -> int:
    number = re.match(r"(?:model\.layers|transformer\.h|h)\.(\d+)\.", name)
    return int(number[1]) if number else -1


def _all_layers(config: Any) -> int:
    """Layers of the model, and those behind them that predict further tokens (MTP)."""
    return config.num_hidden_layers + (getattr(config, "num_nextn_predict_layers", None) or 0)


def skeleton(folder: str | Path) -> PreTrainedModel:
    """The folder's model without its weights, on the device meta.

    Raises: FormatError as `load` does; no tensor is read for it.
    """
    checkpoint = checked(folder)
    with usable(checkpoint.path), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint.path, **OF_FOLDER))
    _require_tensors(checkpoint, model)
    return model


def _require_tensors(checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    """Raises: FormatError where the folder lacks a tensor of the model, has it in another shape, or has more layers."""
    if more := [name for name in checkpoint.names() if _layer_of(name) >= _all_layers(model.config)]:
        raise FormatError(f"{checkpoint.path} has more layers than config.json says: {_few(more)}")
    # some folders name the tensors of the model below its head alone
    prefix = f"{model.base_model_prefix}."
    stored = {name.removeprefix(prefix): checkpoint.shape(name) for name in checkpoint.names()}
    for name, tensor in stored_tensors(model).items():
        have, want = stored.get(name.removeprefix(prefix)), tuple(tensor.shape)
        if have is None and name not in model.all_tied_weights_keys:
            raise FormatError(f"{checkpoint.path} has no tensor {name}, of which config.json speaks")
        if have is not None and tuple(have) != want:
            raise FormatError(f"{checkpoint.path}: {name} is {list(have)}, by config.json {list(want)}")


@contextmanager
def usable(folder: Path) -> Iterator[None]:
    """Inside, transformers reads config.json.

    Raises: FormatError where it stumbles over a value there.
    """
    try:
        yield
    except (StrictDataclassError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise FormatError(
            f"{folder / 'config.json'}: transformers cannot use it ({type(error).__name__}: {error})"
        ) from error


def _few(names: Any) -> str:
    listed = sorted(str(name) for name in names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")

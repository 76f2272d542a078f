"""`model: {kind: pretrained, folder: ...}`: a public checkpoint, continued with our layers, objectives and rules."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from moestro.data import FileTokenizer
from moestro.formats import FormatError
from moestro.recipe.bind import Binder, Part
from moestro.recipe.resolve import Origin, Place
from moestro.recipe.shared_banks import SharedBanks, check_names
from moestro.recipe.syntax import RecipeError

if TYPE_CHECKING:
    from moestro.hf import Hosted

PRETRAINED = "pretrained"
LAYER_GIVEN = ("d_model", "shared_banks")


@dataclass(frozen=True)
class Pretrained:
    """The `model` section of this kind: the decoder in `folder` (Hugging Face's format, one of the families of
    `moestro.formats`), its weights in `dtype`. Its feed-forward blocks become our layers over the same tensors;
    `layers` puts others in their place by the number of the block, `ffn` in all blocks that `layers` does not name.
    `shared_banks` as in other models.

    A relative `folder` is looked for beside the recipe first.
    """

    folder: Path
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    ffn: Any | None = None
    layers: dict = field(default_factory=dict)
    shared_banks: dict = field(default_factory=dict)
    allow_non_causal: bool = False


def bound(node: Mapping[str, Any], place: Place, binder: Binder) -> Pretrained:
    """The section at `place`, its keys and types checked; `ffn`, values of `layers` and `shared_banks` are parts.

    Raises: RecipeError.
    """
    told = {key: value for key, value in node.items() if key != "kind"}
    plan = Pretrained(**binder.bind(Pretrained, told, place, given=LAYER_GIVEN).keywords)
    for key in plan.layers:
        if type(key) is not int or key < 0:
            raise (place / "layers" / key).error(f"layer {key!r}, allowed: the number of a block, from 0")
    layers = _parts("ffn", plan.layers, place / "layers", binder, LAYER_GIVEN)
    shared = _parts("shared_part", plan.shared_banks, place / "shared_banks", binder, ("d_model",))
    check_names(shared, [*([plan.ffn] if plan.ffn else []), *layers.values()], place / "shared_banks")
    return replace(plan, folder=located(plan.folder, place.origin), layers=layers, shared_banks=shared)


def _parts(slot: str, nodes: dict, place: Place, binder: Binder, given: tuple[str, ...]) -> dict[Any, Part]:
    """The parts of one slot in a mapping."""
    return {key: binder.part(slot, node, place / key, given) for key, node in nodes.items()}


def located(folder: Path, origin: Origin) -> Path:
    """An absolute path: beside the recipe where there is such a folder, else below the working directory."""
    beside = origin.path.parent / folder.expanduser()
    return (beside if beside.exists() else folder.expanduser()).absolute()


def hosted(plan: Pretrained, vocab_size: int, seq_len: int, origin: Origin) -> "Hosted":
    """The decoder with its weights, or without them where torch's default device is meta; fresh layers are drawn from
    torch's default generator.

    Raises: RecipeError where the folder cannot be read, a part refuses its values, a layer does not fit, or the data
    has more tokens or longer windows than the model knows;
    ImportError naming the extra where transformers is not installed.
    """
    place = Place(origin, ("model",))
    hf = library()
    try:
        empty = torch.get_default_device().type == "meta"
        decoder = hf.skeleton(plan.folder) if empty else hf.load(plan.folder, dtype=getattr(torch, plan.dtype))
    except FormatError as error:
        raise (place / "folder").error(str(error)) from error
    known: dict[str, Any] = {"d_model": decoder.config.hidden_size}
    known["shared_banks"] = SharedBanks(plan.shared_banks, dict(known))
    parts = {i: plan.ffn for i in range(decoder.config.num_hidden_layers) if plan.ffn} | plan.layers
    try:
        model = hf.Hosted(decoder, {i: part.build(known) for i, part in parts.items()}, plan.allow_non_causal)
    except RecipeError:
        raise
    except ValueError as error:
        raise place.error(str(error)) from error
    if vocab_size > model.vocab_size:
        raise Place(origin, ("data", "tokenizer")).error(
            f"the tokenizer has {vocab_size:,} tokens, the model in {plan.folder} {model.vocab_size:,}"
        )
    if model.longest is not None and seq_len > model.longest:
        raise Place(origin, ("data", "seq_len")).error(
            f"seq_len={seq_len:,}, but the model in {plan.folder} has {model.longest:,} positions"
        )
    return model


def pretrained_tokenizer(folder: Path) -> FileTokenizer:
    """The tokenizer of a folder in Hugging Face's format: tokenizer.json, or a sentencepiece model that transformers
    turns into one."""
    return library().tokenizer_of(folder)


def library() -> Any:
    """The package `moestro.hf`, which is imported only where it is needed: transformers takes seconds.

    Raises: ImportError naming the extra where transformers is not installed.
    """
    try:
        from moestro import hf
    except ImportError as error:
        raise ImportError(f'public checkpoints need transformers: pip install "moestro[hf]" ({error})') from error
    return hf

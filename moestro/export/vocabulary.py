"""The constructors that a stored construction may name: those that recipes name, and the decoder around them."""

from collections.abc import Callable
from typing import Any

from moestro.layers import LowRankMixtures, adapt
from moestro.model import Attention, Block, PassedBlock, Transformer
from moestro.recipe.parts import PARTS
from moestro.routers.groups import GroupLimit


def vocabulary() -> dict[str, Callable[..., Any]]:
    """Constructors by their names. A folder's configuration can call nothing else."""
    parts = {make.__name__: make for slot in PARTS.values() for make in slot.values()}
    around = (Attention, Block, PassedBlock, Transformer, GroupLimit, adapted)
    return parts | {make.__name__: make for make in around}


def adapted(model: Transformer, mixtures: LowRankMixtures, targets: str, allow_non_causal: bool = False) -> Transformer:
    """The same decoder, with mixtures around the linear maps whose names have `targets` in them."""
    adapt(model, targets, mixtures, freeze=False, allow_non_causal=allow_non_causal)
    return model

"""From hidden units to a mixture layer and back: the recipe node, the layer with its weights, the units of a layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from moestro.convert.network import Network, concatenated, into_expert, of_expert
from moestro.experts import BiasedFFNBank, FFNBank, OutputBias, SharedExpert
from moestro.layers import MoELayer
from moestro.recipe.load import BINDER
from moestro.recipe.resolve import Origin, Place

# What a converted layer computes that the dense one does: all experts with gates of 1; the layer as it routes; nothing.
Exact = Literal["all", "routed", "no"]


@dataclass
class Mixture:
    """What a method made of one network: the recipe's `node` of the layer, the `layer` itself, and where each unit of
    the dense network lies among the layer's units (`rows`, -1 where it lies nowhere), by which it is gathered again.
    `exact` says where layer and network agree. Each `parts` consecutive experts are one copy and share a router row."""

    node: dict[str, Any]
    layer: MoELayer
    rows: Int[Tensor, "w"]
    exact: Exact
    parts: int = 1

    def units(self) -> Network:
        """All hidden units of the layer: those of expert 0, 1, ..., then the shared expert's."""
        return units_of(self.layer)


def make_mixture(
    routed: Network,
    widths: Sequence[int],
    select: Mapping[str, Any],
    rows: Int[Tensor, "w"],
    exact: Exact,
    shared: Network | None = None,
    parts: int = 1,
) -> Mixture:
    """A layer whose expert e has the next widths[e] units of `routed`, with `shared` on every token and the output bias
    once. The router is fresh, an affine score.

    Raises: RecipeError where a part refuses its values.
    """
    kind = {"activation": routed.activation, "glu": routed.glu}
    branches: list[dict[str, Any]] = [
        {"kind": "biased_ffn" if routed.biased else "ffn", "widths": list(widths), **kind}
    ]
    if shared is not None:
        branches.append({"kind": "shared", "width": shared.width, **kind, "bias": shared.biased})
    if routed.out_bias is not None:
        branches.append({"kind": "bias"})
    router = {"kind": "scored", "score": {"kind": "affine"}, "select": dict(select)}
    node = {"kind": "moe", "router": router, "branches": branches}
    layer = built_layer(node, routed.d_model).to(routed.up)
    fill(layer, routed, shared and replace(shared, out_bias=None))
    return Mixture(node, layer, rows, exact, parts)


def built_layer(node: Mapping[str, Any], d_model: int, name: str = "converted layer") -> MoELayer:
    """The layer that a recipe's node stands for."""
    place = Place(Origin(Path(name), {}))
    return BINDER.part("ffn", dict(node), place, given=("d_model",)).build({"d_model": d_model})


@torch.no_grad()
def fill(layer: MoELayer, routed: Network, shared: Network | None) -> None:
    """Copy units into a layer's bank and shared expert, and the output bias."""
    bank = layer.bank
    ffn = bank.ffn if isinstance(bank, BiasedFFNBank) else bank
    if not isinstance(ffn, FFNBank):
        raise TypeError(f"{type(bank).__name__} is not made of hidden units")
    inward = [routed.up] if routed.gate is None else [routed.gate, routed.up]
    ffn.w_in.weight.copy_(_unit_major(inward, ffn.widths))
    ffn.w_out.weight.copy_(routed.down)
    if isinstance(bank, BiasedFFNBank):
        bank.bias.copy_(_unit_major(list(routed.biases().T), ffn.widths))
    for branch in layer.branches:
        if isinstance(branch, SharedExpert) and shared is not None:
            into_expert(shared, branch)
        if isinstance(branch, OutputBias) and routed.out_bias is not None:
            branch.bias.copy_(routed.out_bias)


def _unit_major(blocks: Sequence[Tensor], widths: Sequence[int]) -> Tensor:
    """[gate of all, up of all] -> [gate, up] of one expert after the other."""
    per_block = [block.split(list(widths)) for block in blocks]
    return torch.cat([part for expert in zip(*per_block, strict=True) for part in expert])


def _blocks(rows: Tensor, widths: Sequence[int], n_blocks: int) -> list[Tensor]:
    """The inverse."""
    experts = [expert.chunk(n_blocks) for expert in rows.split([n_blocks * width for width in widths])]
    return [torch.cat([expert[block] for expert in experts]) for block in range(n_blocks)]


@torch.no_grad()
def units_of(layer: MoELayer) -> Network:
    """All hidden units of a layer of feed-forward experts, with its output bias.

    Raises: ValueError for experts of another kind.
    """
    bank = layer.bank
    ffn = bank.ffn if isinstance(bank, BiasedFFNBank) else bank
    if not isinstance(ffn, FFNBank):
        raise ValueError(f"{type(bank).__name__}: experts that are no feed-forward networks cannot be gathered")
    blocks = ffn.w_in.blocks
    parts = _blocks(ffn.w_in.weight.detach(), ffn.widths, blocks)
    biases = _blocks(bank.bias.detach(), ffn.widths, blocks) if isinstance(bank, BiasedFFNBank) else [None] * blocks
    out = [branch.bias.detach() for branch in layer.branches if isinstance(branch, OutputBias)]
    gated = (parts[0], biases[0]) if blocks == 2 else (None, None)
    network = Network(
        ffn.activation, parts[-1], ffn.w_out.weight.detach(), gated[0], biases[-1], gated[1], out[0] if out else None
    )
    shared = [of_expert(branch) for branch in layer.branches if isinstance(branch, SharedExpert)]
    return concatenated([network, *shared])

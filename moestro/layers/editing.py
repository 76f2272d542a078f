"""Editing experts: what a trained model does when some of them count less, more, or not at all."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from moestro.layers.moe import MoELayer
from moestro.routing import Routing


@contextmanager
def scaled_experts(layer: MoELayer, scale: Mapping[int, float]) -> Iterator[None]:
    """Inside, the weight of every named expert of `layer` is multiplied by its number, 0 to take it out; gates of
    others stay as they are and are not renormalised. For inference; weights and state do not change.

    Raises: ValueError for an expert that is none of the layer's.
    """
    n_experts = layer.router.n_experts
    for expert in scale:
        if not 0 <= expert < n_experts:
            raise ValueError(f"expert {expert}, allowed: 0 to {n_experts - 1}")
    factor = torch.ones(n_experts, dtype=torch.float64)
    factor[list(scale)] = torch.tensor(list(scale.values()), dtype=torch.float64)

    def edit(_router: nn.Module, _arguments: tuple, routing: Routing) -> Routing:
        return routing.scaled(factor)

    handle = layer.router.register_forward_hook(edit)
    try:
        yield
    finally:
        handle.remove()

"""A layer in which some experts take no part: their logits at -inf before anything is chosen, as if their router rows
were gone. Weights and state stay as they are."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from moestro.layers.moe import MoELayer
from moestro.routers.base import ScoredRouter
from moestro.routers.biased import BiasedRouter


@contextmanager
def without(layer: MoELayer, experts: Sequence[int]) -> Iterator[None]:
    """Inside, the layer's router never chooses these experts, and gates are those of the others alone.

    Raises: ValueError for experts that the layer has not, for so many that a token would find too few, and for routers
    that are neither scored nor biased.
    """
    router = layer.router
    wrong = [expert for expert in experts if not 0 <= expert < router.n_experts]
    if wrong:
        raise ValueError(f"experts {wrong}, allowed: 0 to {router.n_experts - 1}")
    if isinstance(router, ScoredRouter):
        before = router.available.clone()
        router.set_available(before & _others(experts, before))
        undo: Callable[[], object] = lambda: router.available.copy_(before)  # noqa: E731
    elif isinstance(router, BiasedRouter):
        undo = _bias(router, experts)
    else:
        raise ValueError(f"{type(router).__name__} has no scores of experts that could be left out")
    try:
        yield
    finally:
        undo()


def _others(experts: Sequence[int], like: Tensor) -> Tensor:
    present = torch.ones_like(like)
    present[list(experts)] = False
    return present


def _bias(router: BiasedRouter, experts: Sequence[int]) -> Callable[[], object]:
    """Biases of -inf, which no score makes up for."""
    present = router.bias > -math.inf
    left = present & _others(experts, present)
    if int(left.sum()) < router.top_k:
        raise ValueError(f"top_k={router.top_k} > {int(left.sum())} experts")
    router.limit.check(router.n_experts, router.top_k, left)
    before = router.bias.clone()
    router.bias[list(experts)] = -math.inf
    return lambda: router.bias.copy_(before)

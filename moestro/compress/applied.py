"""Plans applied to a model in memory: what they cost is then measured before anything is written."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moestro.compress.feed_forward import FeedForward
from moestro.compress.lowrank import factors
from moestro.compress.observed import Observed
from moestro.compress.plan import LayerPlan, Semantics
from moestro.compress.units import Units, merged
from moestro.layers.moe import MoELayer
from moestro.routers import BiasedRouter, RemappedRouter, ScoredRouter, SkippingTopK, TopK


def layer_number(name: str) -> int:
    """The number of the decoder layer in a mixture layer's name: the first in it.

    Raises: ValueError where there is none.
    """
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    if not numbers:
        raise ValueError(f"{name} has no number of a decoder layer in it")
    return numbers[0]


def applied(
    model: nn.Module,
    plans: Sequence[LayerPlan],
    semantics: Semantics = "slice",
    merged_rows: str = "kept",
    moments: Mapping[str, Observed] | None = None,
) -> Any:
    """A copy of a decoder with its mixture layers as the plans say, in the terms of `moestro.compress.plan`. Low ranks
    are multiplied out: same numbers, no smaller. `moments` whiten them, statistics by the layer's name.

    Raises: ValueError where a plan does not fit its layer.
    """
    smaller = copy.deepcopy(model)
    layers: dict[str, MoELayer] = smaller.moe_layers()  # type: ignore[operator]
    numbers = {layer_number(name): name for name in layers}
    for plan in plans:
        if plan.layer not in numbers:
            raise ValueError(f"layer {plan.layer} has no experts, allowed: {', '.join(map(str, numbers))}")
        name = numbers[plan.layer]
        apply_to(layers[name], plan, semantics, merged_rows, None if moments is None else moments[name])
    return smaller


@torch.no_grad()
def apply_to(
    layer: MoELayer, plan: LayerPlan, semantics: Semantics, merged_rows: str, moments: Observed | None = None
) -> None:
    """One layer, in place."""
    if plan.n_experts != layer.router.n_experts:
        raise ValueError(f"layer {plan.layer} has {layer.router.n_experts} experts, the plan is of {plan.n_experts}")
    changes = plan.merges or plan.factors or plan.narrows
    old = FeedForward.of(layer) if changes else None
    bank = old and old.bank_of([new_expert(old, plan, j, moments) for j in range(plan.n_kept)])
    rows = _rows(layer, plan, semantics, merged_rows)
    index = torch.tensor(plan.keep, device=next(layer.parameters()).device)
    if plan.skip_below is not None:
        _skip(layer, plan.skip_below)
    if semantics == "slice":
        layer.reindex(index)
    else:
        for each in layer.banks():
            each.reindex(index)
        layer.router = RemappedRouter(layer.router, plan.new_ids).to(index.device)
    if bank is not None:
        layer.branches[[branch is layer.bank for branch in layer.branches].index(True)] = bank
    for tensor, means in zip(_by_expert(layer.router) if rows else (), rows, strict=True):
        tensor.copy_(means)


def new_expert(bank: FeedForward, plan: LayerPlan, place: int, moments: Observed | None) -> Units:
    """The units of a new expert: its group's sum, then without the units that go, then of low rank."""
    old = plan.keep[place]
    units = bank.units(old)
    if plan.groups is not None and plan.groups[place].weights != (1.0,):
        group = plan.groups[place]
        members = [bank.units(member) for member in group.members]
        units = merged(members, group.weights, group.align, group.members.index(old))
    if plan.units is not None and (stay := plan.units[place]) is not None:
        units = units[list(stay)]
    if plan.ranks is not None and (rank := plan.ranks[place]) is not None:
        units = thinned(units, bank.d_model, rank, _moments(moments, old))
    return units


def thinned(units: Units, d_model: int, rank: int, moments: tuple[Tensor | None, Tensor | None]) -> Units:
    """The units of an expert whose matrices are products of this rank, multiplied out."""
    *inside, out = units.split(d_model, dim=1)
    thin = [torch.matmul(*factors(matrix, rank, moments[0])) for matrix in inside]
    return torch.cat([*thin, torch.matmul(*factors(out.T, rank, moments[1])).T], dim=1)


def _moments(moments: Observed | None, expert: int) -> tuple[Tensor | None, Tensor | None]:
    if moments is None:
        return None, None
    return getattr(moments, f"input_moments_{expert}"), getattr(moments, f"hidden_moments_{expert}")


def _rows(layer: MoELayer, plan: LayerPlan, semantics: Semantics, merged_rows: str) -> list[Tensor]:
    """The router's rows and biases of merged experts, where they are means."""
    if semantics != "slice" or merged_rows != "mean" or not plan.groups:
        return []
    shares = torch.zeros(plan.n_kept, plan.n_experts, dtype=torch.float64, device=next(layer.parameters()).device)
    for new, group in enumerate(plan.groups):
        shares[new, list(group.members)] = shares.new_tensor(group.weights) / sum(group.weights)
    return [torch.tensordot(shares, old.double(), 1).to(old.dtype) for old in _by_expert(layer.router)]


def _by_expert(router: Any) -> list[Tensor]:
    """The tensors of a router that have a row or a number for every expert, and are averaged where experts merge."""
    score = router.score
    biases = [getattr(score, "bias", None), router.bias if isinstance(router, BiasedRouter) else None]
    return [score.weight, *(bias for bias in biases if bias is not None)]


def _skip(layer: MoELayer, below: float) -> None:
    router = layer.router
    if not isinstance(router, ScoredRouter) or type(router.select) is not TopK:
        raise ValueError(f"dynamic skipping is for top-k routers, not {type(router).__name__}")
    chosen = router.select
    router.select = SkippingTopK(chosen.top_k, below, chosen.renormalize, chosen.gate, chosen.limit, chosen.scale)


def kept(name: str, n_experts: int, keep: Sequence[int], **more: Any) -> LayerPlan:
    """The plan of a layer that keeps these experts."""
    return replace(LayerPlan(layer_number(name), n_experts, tuple(sorted(keep))), **more)

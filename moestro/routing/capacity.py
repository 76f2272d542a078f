"""How many rows an expert may get, and which it keeps: functions on routings, for any selection."""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moestro.routing.decisions import SparseRouting, present

PRIORITIES = ("rank", "gate", "position")


def available(logits: Float[Tensor, "t e"]) -> Int[Tensor, "m"]:
    """The numbers of the experts that take part."""
    return present(logits).nonzero().squeeze(-1)


def rows_allowed(n_tokens: int, n_experts: int, factor: float, minimum: int = 1) -> int:
    """max(ceil(factor * tokens / experts), minimum), and never more than there are tokens: the rows of one expert."""
    return min(n_tokens, max(math.ceil(factor * n_tokens / max(1, n_experts)), minimum))


def limited(routing: SparseRouting, capacity: int, priority: str = "rank") -> SparseRouting:
    """The routing in which every expert keeps its `capacity` best rows; the others contribute nothing.

    `rank`: first those of tokens that rank this expert higher among their own, then by weight (the order of
    (K - rank) + P in the released code of XMoE, arXiv:2403.18926); `gate`: by weight; `position`: first come, first
    served. Ties go to the earlier token. `wanted` is the routing given. The choice has
    no gradient; what is kept keeps its weight.

    Raises: ValueError for a negative capacity or an unknown priority.
    """
    if capacity < 0:
        raise ValueError(f"capacity={capacity}, allowed: at least 0")
    if priority not in PRIORITIES:
        raise ValueError(f"priority={priority!r}, allowed: {', '.join(PRIORITIES)}")
    kept = _place(_by_priority(routing, priority), routing.expert) < capacity
    return replace(routing.keep(kept), wanted=routing.as_wanted())


def _by_priority(routing: SparseRouting, priority: str) -> Int[Tensor, "n"]:
    """Row numbers, the most important first."""
    order = routing.token.argsort(stable=True)
    if priority == "position":
        return order
    by_weight = order[routing.weight.detach()[order].argsort(descending=True, stable=True)]
    if priority == "gate":
        return by_weight
    rank = _place(by_weight, routing.token)
    return by_weight[rank[by_weight].argsort(stable=True)]


def _place(order: Int[Tensor, "n"], group: Int[Tensor, "n"]) -> Int[Tensor, "n"]:
    """How many rows of a row's own group stand before it in `order`."""
    order = order[group[order].argsort(stable=True)]
    ordered = group[order]
    first = torch.searchsorted(ordered, ordered)
    place = torch.empty_like(order)
    return place.index_copy(0, order, torch.arange(len(order), device=order.device) - first)


@dataclass(frozen=True)
class RowUsage:
    """Rows of a routing: `wanted` before a capacity dropped some, `useful` those that count, and `fixed_shape`, those
    that an implementation with `capacity` rows for every expert, filled or not, would compute. Here rows are ragged:
    what is computed is what is useful. `starved`: share of tokens left without any row they wanted; `unfilled`: share
    of experts with room left."""

    wanted: int
    useful: int
    fixed_shape: int
    starved: float
    unfilled: float


def row_usage(routing: SparseRouting, capacity: int) -> RowUsage:
    """Count a routing's rows against a capacity."""
    kept, wanted = routing.per_token(1.0), routing.as_wanted().per_token(1.0)
    starved = (wanted > 0) & (kept == 0)
    return RowUsage(
        wanted=int(wanted.sum()),
        useful=routing.n_rows,
        fixed_shape=capacity * routing.n_experts,
        starved=float(starved.double().mean()) if len(starved) else 0.0,
        unfilled=float((routing.load() < capacity).double().mean()),
    )

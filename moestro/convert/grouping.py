"""Which hidden units make an expert: an order of the units, of which the first widths[0] are expert 0's, and so on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from moestro.convert.seen import Seen


class Grouping(Protocol):
    """An order of the units of `seen.network` for experts of these widths."""

    def __call__(self, seen: Seen, widths: Sequence[int]) -> Int[Tensor, "w"]: ...


@dataclass(frozen=True)
class Contiguous:
    """Units as they stand (the released code of FactorLLM, Zhao 2024, arXiv:2408.11855)."""

    def __call__(self, seen: Seen, widths: Sequence[int]) -> Int[Tensor, "w"]:
        return torch.arange(seen.network.width)


@dataclass(frozen=True)
class Shuffled:
    """Units at random, by the seed of the conversion."""

    def __call__(self, seen: Seen, widths: Sequence[int]) -> Int[Tensor, "w"]:
        return torch.randperm(seen.network.width, generator=seen.generator())


@dataclass(frozen=True)
class Importance:
    """Units by falling importance (`Seen.importance`): expert 0 gets those that matter most. With `dealt` they are
    dealt out instead, each to the expert that has the smallest share of its width so far: all experts matter alike."""

    dealt: bool = False

    def __call__(self, seen: Seen, widths: Sequence[int]) -> Int[Tensor, "w"]:
        order = seen.importance().argsort(descending=True, stable=True)
        if not self.dealt:
            return order
        groups: list[list[int]] = [[] for _ in widths]
        for unit in order.tolist():
            open_ = [e for e, width in enumerate(widths) if len(groups[e]) < width]
            groups[min(open_, key=lambda e: ((len(groups[e]) + 0.5) / widths[e], e))].append(unit)
        return torch.tensor([unit for group in groups for unit in group], dtype=torch.int64)


@dataclass(frozen=True)
class BalancedKMeans:
    """Units whose first maps are alike (`on: weights`, rows of length 1), or that are active on the same tokens
    (`on: activations`, |h_u| over the calibration tokens, of length 1): k-means in which cluster e has exactly
    widths[e] units (after MoEfication, Zhang 2022, arXiv:2110.01786). Each round, every unit asks for the nearest
    centre that has room and centres keep the nearest that ask."""

    on: Literal["weights", "activations"] = "weights"
    rounds: int = 20

    def __post_init__(self) -> None:
        if self.on not in ("weights", "activations"):
            raise ValueError(f"on={self.on!r}, allowed: weights, activations")
        if self.rounds < 1:
            raise ValueError(f"rounds={self.rounds}, allowed: at least 1")

    def __call__(self, seen: Seen, widths: Sequence[int]) -> Int[Tensor, "w"]:
        points = F.normalize(self._features(seen).float().cpu(), dim=1)
        start = torch.randperm(len(points), generator=seen.generator())[: len(widths)]
        centres, cluster = points[start], torch.full((len(points),), -1)
        for _ in range(self.rounds):
            before, cluster = cluster, assigned(torch.cdist(points, centres), widths)
            if torch.equal(before, cluster):
                break
            centres = torch.stack([_mean(points[cluster == e], centres[e]) for e in range(len(widths))])
        return cluster.argsort(stable=True)

    def _features(self, seen: Seen) -> Float[Tensor, "w f"]:
        if self.on == "activations":
            return seen.hidden().abs().T
        network = seen.network
        return network.up if network.gate is None else torch.cat([network.gate, network.up], dim=1)


def _mean(points: Float[Tensor, "n f"], empty: Float[Tensor, "f"]) -> Float[Tensor, "f"]:
    return points.mean(0) if len(points) else empty


def assigned(distance: Float[Tensor, "w e"], widths: Sequence[int]) -> Int[Tensor, "w"]:
    """A cluster for every unit, exactly widths[e] in each: units ask for the nearest one with room, which takes the
    nearest of those that ask; the others ask again."""
    cluster = torch.full((len(distance),), -1)
    room = torch.tensor(list(widths))
    while (waiting := (cluster < 0).nonzero().squeeze(1)).numel():
        open_ = distance[waiting].masked_fill(room == 0, torch.inf)
        nearest, asked = open_.min(dim=1)
        for e in asked.unique().tolist():
            asking = asked == e
            taken = waiting[asking][nearest[asking].argsort(stable=True)[: int(room[e])]]
            cluster[taken] = e
            room[e] -= len(taken)
    return cluster


@dataclass(frozen=True)
class CoActivation:
    """Units that are active together: groups grow one unit at a time, each time by the unit that was active most often
    when those in the group were (after the co-activation graph of MoEfication, Zhang 2022, arXiv:2110.01786, whose
    partition tool is another). A unit counts as active on the `share` of tokens on which |h_u| is greatest."""

    share: float = 0.25

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share}, allowed: above 0, at most 1")

    def __call__(self, seen: Seen, widths: Sequence[int]) -> Int[Tensor, "w"]:
        together = self.together(seen)
        left, order = torch.ones(len(together), dtype=torch.bool), []
        for width in widths:
            # the first unit of a group is the one that the units left over are most often active with
            pull = together @ left.float()
            for member in range(width):
                unit = int(torch.where(left, pull, -torch.inf).argmax())
                order.append(unit)
                left[unit] = False
                pull = together[unit].clone() if member == 0 else pull + together[unit]
        return torch.tensor(order, dtype=torch.int64)

    def together(self, seen: Seen) -> Float[Tensor, "w w"]:
        """Tokens on which both units are active."""
        size = seen.hidden().abs().float().cpu()
        most = max(1, round(self.share * len(size)))
        # a unit that is silent on more tokens than that is not active on them
        active = ((size >= size.kthvalue(len(size) - most + 1, dim=0).values) & (size > 0)).float()
        return active.T @ active


def equal_importance(n_experts: int, importance: Float[Tensor, "w"], total: int, multiple_of: int = 1) -> list[int]:
    """Widths that share the importance of the units evenly, once these stand by falling importance: experts of few
    important units are narrow, those of many unimportant ones wide (ours; HMoE-style experts, arXiv:2408.10681, of a
    trained network). Multiples of `multiple_of`, at least one each.

    Raises: ValueError where there are too few units.
    """
    if n_experts < 1 or multiple_of < 1 or total % multiple_of or total // multiple_of < n_experts:
        raise ValueError(
            f"multiple_of={multiple_of}: {total} units do not make n_experts={n_experts} widths of multiples of it"
        )
    units = total // multiple_of
    falling = importance.sort(descending=True).values.double().view(units, multiple_of).sum(1)
    share = falling.cumsum(0) / falling.sum().clamp(min=torch.finfo(torch.float64).tiny)
    ends = [int((share < (e + 1) / n_experts - 1e-12).sum()) + 1 for e in range(n_experts - 1)] + [units]
    for e in range(n_experts):
        least, most = (ends[e - 1] if e else 0) + 1, units - (n_experts - 1 - e)
        ends[e] = min(max(ends[e], least), most)
    return [multiple_of * (end - start) for start, end in zip([0, *ends], ends, strict=False)]

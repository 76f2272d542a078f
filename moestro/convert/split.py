"""`Split`: every hidden unit of a dense network goes to one expert."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from moestro.convert.grouping import Contiguous, Grouping
from moestro.convert.mixture import Mixture, make_mixture
from moestro.convert.seen import Seen


class Split:
    """Experts that are parts of the dense network (Zhao 2024, FactorLLM, arXiv:2408.11855): expert e has widths[e] of
    its units, which `grouping` chooses; values do not change. All experts with gates of 1 are the dense network, for
    every grouping.

    The most important `shared` units make a shared expert on every token instead (the residual expert of LLaMA-MoE v2,
    arXiv:2411.15708). `pad` makes all widths equal with units of zeros, where they do not come out even; they add
    nothing and learn nothing. Widths that `equal_importance` makes mean units by falling importance.

    Of n experts `top_k` are chosen, with gates of the kind `gate` (`ScaledTopK`). `scale`: 1, `n/k`, or `fit`, what
    comes nearest to the dense output, by least squares over the calibration tokens with the router as converted.
    """

    def __init__(
        self,
        widths: Callable[..., Sequence[int]],
        top_k: int,
        grouping: Grouping = Contiguous(),  # noqa: B008
        shared: int = 0,
        gate: Literal["hard", "straight_through", "share", "softmax"] = "straight_through",
        scale: Literal["1", "n/k", "fit"] = "1",
        pad: bool = False,
    ) -> None:
        if shared < 0:
            raise ValueError(f"shared={shared}, allowed: at least 0")
        if scale not in ("1", "n/k", "fit"):
            raise ValueError(f"scale={scale!r}, allowed: '1', n/k, fit")
        self.widths, self.top_k, self.grouping, self.shared = widths, top_k, grouping, shared
        self.gate, self.scale, self.pad = gate, scale, pad

    def __call__(self, seen: Seen) -> Mixture:
        """Raises: ValueError for impossible widths or `shared`."""
        network = seen.network
        if self.shared >= network.width:
            raise ValueError(f"shared={self.shared}, allowed: fewer than {network.width}, the units of the network")
        chosen = seen.importance().argsort(descending=True, stable=True)
        rest = chosen[self.shared :].sort().values if self.shared else torch.arange(network.width)
        routed = Seen(network.take(rest.to(network.up.device)), seen.x, seen.seed)
        widths = list(self.widths(total=len(rest), importance=routed.importance()))
        if min(widths) < 1:
            raise ValueError(
                f"widths: {len(widths)} experts for {len(rest)} units, allowed: at least one unit for every expert"
            )
        order = rest[self.grouping(routed, widths)]
        order, widths = padded(order, widths) if self.pad else (order, widths)
        if self.top_k > len(widths):
            raise ValueError(f"top_k={self.top_k} > {len(widths)} experts")
        shared = chosen[: self.shared]
        return make_mixture(
            network.take(order.to(network.up.device)),
            widths,
            self._select(len(widths)),
            places(torch.cat([order, shared]), network.width),
            "all",
            network.take(shared.to(network.up.device)) if self.shared else None,
        )

    def _select(self, n_experts: int) -> dict[str, Any]:
        scale = n_experts / self.top_k if self.scale == "n/k" else 1.0
        return {"kind": "scaled_top_k", "top_k": self.top_k, "gate": self.gate, "scale": scale}

    @property
    def fits_scale(self) -> bool:
        """Whether the scale is to be fitted once the router is there."""
        return self.scale == "fit"


def padded(order: Int[Tensor, "w"], widths: Sequence[int]) -> tuple[Int[Tensor, "m"], list[int]]:
    """Every group as long as the longest, filled up with -1."""
    widest = max(widths)
    groups = [torch.cat([group, group.new_full((widest - len(group),), -1)]) for group in order.split(list(widths))]
    return torch.cat(groups), [widest] * len(groups)


def places(order: Int[Tensor, "m"], n_units: int) -> Int[Tensor, "w"]:
    """Where each unit stands in `order`, the first time."""
    there = [-1] * n_units
    for place, unit in reversed(list(enumerate(order.tolist()))):
        if unit >= 0:
            there[unit] = place
    return torch.tensor(there)

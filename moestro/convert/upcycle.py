"""Upcycling: every expert begins as a copy of the dense network, or of a part of it."""

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moestro.convert.mixture import Mixture, make_mixture
from moestro.convert.network import Network
from moestro.convert.seen import Seen
from moestro.convert.split import places

# copies of a network, far more than any memory holds
MOST_EXPERTS = 2**20


class Upcycle:
    """`n_experts` copies of the dense network, `top_k` for every token (Komatsuzaki 2023, sparse upcycling,
    arXiv:2212.05055). Gates of the chosen sum to 1, so that the layer computes what the network did, whatever its
    router says.

    `drop` re-initialises that share of the hidden units in every expert, drawn for each expert apart: in each matrix
    normal with mean and standard deviation of the drawn units' weights (Nakamura 2025, Drop-Upcycling,
    arXiv:2502.19261, which finds 0.5 best). Biases stay. The layer then differs from the network.

    `granularity` g cuts each copy into g experts of w / g units: n_experts * g narrow experts in all, of which
    `top_k * g` are chosen (He 2024, arXiv:2410.07524). Router rows of one copy's parts are equal (a virtual group), so
    that whole copies are chosen. Where the paper scales weights, gates are scaled here, which is the same function and
    keeps the weights as they were. `gate: share` makes them sum to 1 over the chosen copies; `softmax`, which the paper
    prefers for training, uses probabilities before the choice, and the layer is the network at a router of zeros alone.
    """

    fits_scale = False

    def __init__(
        self,
        n_experts: int,
        top_k: int,
        drop: float = 0.0,
        granularity: int = 1,
        gate: Literal["share", "softmax"] = "share",
    ) -> None:
        if not 1 <= n_experts <= MOST_EXPERTS:
            raise ValueError(f"n_experts={n_experts}, allowed: 1 to {MOST_EXPERTS}")
        if not 1 <= top_k <= n_experts:
            raise ValueError(f"top_k={top_k}, allowed: 1 to {n_experts}, the number of experts")
        if not 0 <= drop <= 1:
            raise ValueError(f"drop={drop}, allowed: 0 to 1")
        if granularity < 1:
            raise ValueError(f"granularity={granularity}, allowed: at least 1")
        if gate not in ("share", "softmax"):
            raise ValueError(f"gate={gate!r}, allowed: share, softmax")
        self.n_experts, self.top_k, self.drop = n_experts, top_k, drop
        self.granularity, self.gate = granularity, gate

    def __call__(self, seen: Seen) -> Mixture:
        """Raises: ValueError where `granularity` does not divide the units."""
        network, parts = seen.network, self.granularity
        if network.width % parts:
            raise ValueError(f"granularity={parts} does not divide {network.width}, the units of the network")
        generator = seen.generator()
        dropped = [drawn(network.width, self.drop, generator) for _ in range(self.n_experts)]
        order = torch.arange(network.width).repeat(self.n_experts)
        kept = torch.where(torch.cat(dropped), -1, order)
        return make_mixture(
            redrawn(network.take(order.to(network.up.device)), dropped, generator),
            [network.width // parts] * (self.n_experts * parts),
            self._select(),
            places(kept, network.width),
            "routed" if self.gate == "share" and not self.drop else "no",
            parts=parts,
        )

    def _select(self) -> dict[str, Any]:
        return {
            "kind": "scaled_top_k",
            "top_k": self.top_k * self.granularity,
            "gate": self.gate,
            "scale": 1 / self.top_k,
        }


def drawn(width: int, share: float, generator: torch.Generator) -> Bool[Tensor, "w"]:
    """round(share * width) units at random."""
    chosen = torch.zeros(width, dtype=torch.bool)
    chosen[torch.randperm(width, generator=generator)[: round(share * width)]] = True
    return chosen


def redrawn(copies: Network, dropped: list[Bool[Tensor, "w"]], generator: torch.Generator) -> Network:
    """The copies of a network, the dropped units of each redrawn, each matrix from its own statistics."""
    if not any(bool(drop.any()) for drop in dropped):
        return copies

    def change(rows: Float[Tensor, "n *d"]) -> Float[Tensor, "n *d"]:
        if rows.ndim < 2:
            return rows
        parts = []
        for part, drop in zip(rows.chunk(len(dropped)), dropped, strict=True):
            old = part[drop.to(part.device)].float()
            fresh = torch.randn(old.shape, generator=generator).to(old.device) * old.std() + old.mean()
            parts.append(part.index_put((drop.nonzero().squeeze(1).to(part.device),), fresh.to(part.dtype)))
        return torch.cat(parts)

    return copies.mapped(change)

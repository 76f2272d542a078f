"""Small networks, what they saw, and a method's mixture of them, in float64."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moestro.convert.mixture import Mixture
from moestro.convert.network import Network
from moestro.convert.seen import Seen
from moestro.convert.split import Split

D, W, TOKENS = 5, 12, 7
KINDS = ("glu", "mlp", "biased glu", "biased mlp")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(kind: str = "glu", width: int = W) -> Network:
    glu, biased = kind.endswith("glu"), kind.startswith("biased")
    return Network(
        "silu" if glu else "gelu",
        up=drawn(width, D, seed=1),
        down=drawn(width, D, seed=2),
        gate=drawn(width, D, seed=3) if glu else None,
        up_bias=drawn(width, seed=4) if biased else None,
        gate_bias=drawn(width, seed=5) if biased and glu else None,
        out_bias=drawn(D, seed=6) if biased else None,
    )


def named(dense: Network) -> dict[str, Tensor]:
    """As the reference wants it, every tensor a leaf of its own."""
    parts = ("up", "down", "gate", "up_bias", "gate_bias", "out_bias")
    found = {part: getattr(dense, part) for part in parts}
    return {part: value.clone().requires_grad_() for part, value in found.items() if value is not None}


def seen(kind: str = "glu", width: int = W, tokens: int = TOKENS) -> Seen:
    return Seen(network(kind, width), drawn(tokens, D, seed=9))


def split(of: Seen, n_experts: int = 4, top_k: int = 2, widths: Sequence[int] | None = None, **options: Any) -> Mixture:
    """A split with a random router; equal widths unless they are given."""

    def lengths(total: int, importance: Tensor) -> list[int]:
        return list(widths) if widths else [total // n_experts + (e < total % n_experts) for e in range(n_experts)]

    made = Split(lengths, top_k, **options)(of)
    score: Any = made.layer.router.score
    with torch.no_grad():
        score.weight.copy_(drawn(*score.weight.shape, seed=20))
        score.bias.copy_(drawn(*score.bias.shape, seed=21))
    return made


def groups(made: Mixture, dense_width: int) -> tuple[list[list[int]], list[int]]:
    """The dense units of every expert and of the shared one, from where each lies."""
    bounds = torch.tensor(made.node["branches"][0]["widths"]).cumsum(0)
    expert = torch.bucketize(made.rows, bounds, right=True)
    units = range(dense_width)
    routed = [[u for u in units if int(expert[u]) == e] for e in range(len(bounds))]
    return routed, [u for u in units if int(expert[u]) == len(bounds)]

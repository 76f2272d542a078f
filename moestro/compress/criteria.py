"""Scores of experts on a calibration text, and the experts that stay. The higher a score, the sooner an expert
stays."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from moestro.compress.observed import Observed

Criterion = Callable[[Observed], Float[Tensor, "e"]]


def frequency(seen: Observed) -> Float[Tensor, "e"]:
    """Share of the rows that each expert computed (the hard count of SEER-MoE, arXiv:2404.05089)."""
    return seen.rows / seen.rows.sum().clamp(min=1)


def gate_sum(seen: Observed) -> Float[Tensor, "e"]:
    """Sum of an expert's gates over the tokens (the soft count of SEER-MoE, arXiv:2404.05089), as a mean."""
    return seen.gates / max(1, seen.tokens)


def mean_norm(seen: Observed) -> Float[Tensor, "e"]:
    """MAN: mean norm of an expert's output over the tokens routed to it, gates left out (arXiv:2606.15716)."""
    return seen.norms / seen.rows.clamp(min=1)


def reap(seen: Observed) -> Float[Tensor, "e"]:
    """Mean over the tokens routed to an expert of gate times norm of its output, gates divided by their sum over the
    token's experts, as the authors' code has it since 2026 (Lasby 2025, REAP, arXiv:2510.13999)."""
    return seen.gated_norms / seen.rows.clamp(min=1)


CRITERIA: dict[str, Criterion] = {"frequency": frequency, "gate-sum": gate_sum, "man": mean_norm, "reap": reap}


def random_scores(n_experts: int, seed: int, layer: int) -> Float[Tensor, "e"]:
    """Scores without meaning, other ones for every seed and layer: what any criterion should beat."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + layer)
    return torch.rand(n_experts, generator=generator, dtype=torch.float64)


def highest(scores: Float[Tensor, "e"], n_kept: int, groups: int = 1) -> tuple[int, ...]:
    """The experts of the highest scores, ascending, as many from each of the router's `groups` of consecutive experts;
    ties go to the lower expert.

    Raises: ValueError for a number that the groups do not share, and scores that are no numbers.
    """
    n_experts = len(scores)
    if not 1 <= n_kept <= n_experts or n_experts % groups or n_kept % groups:
        raise ValueError(f"n_kept={n_kept} of {n_experts} experts in {groups} groups, allowed: as many of every group")
    if not bool(scores.isfinite().all()):
        raise ValueError(f"scores={scores.tolist()}, allowed: finite numbers")
    size, each = n_experts // groups, n_kept // groups
    kept: list[int] = []
    for group in range(groups):
        part = scores[group * size : (group + 1) * size]
        order = part.sort(descending=True, stable=True).indices[:each]
        kept += (order + group * size).tolist()
    return tuple(sorted(kept))


def skip_threshold(weights: Float[Tensor, "t k"]) -> float:
    """beta of NAEE's dynamic skipping (Lu 2024, arXiv:2402.14800): the median over tokens of second gate / first gate.

    Raises: ValueError with fewer than 2 experts a token.
    """
    if weights.ndim != 2 or weights.shape[1] < 2 or not len(weights):
        raise ValueError(f"weights of shape {tuple(weights.shape)}, allowed: [tokens, at least 2 experts]")
    first, second = weights.detach().double().topk(2).values.unbind(-1)
    return float((second / first.clamp(min=torch.finfo(torch.float64).tiny)).quantile(0.5))


def removed(kept: Sequence[int], n_experts: int) -> tuple[int, ...]:
    """The other experts, ascending."""
    return tuple(expert for expert in range(n_experts) if expert not in set(kept))

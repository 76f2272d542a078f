"""Which precision a token's experts deserve: the more gate weight stands before an expert, the less it matters."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor


class Precision(IntEnum):
    """What is asked of an expert, or what a copy of it is."""

    SKIP = 0
    LOW = 1
    HIGH = 2


@dataclass(frozen=True)
class Thresholds:
    """Scores up to `high` ask for HIGH, up to `low` for LOW, above for nothing (HOBBIT's T1 and T2, both inclusive).

    The defaults ask for HIGH always. Mixtral 8x7B: 0.6 and 0.9 (Tang 2024, arXiv:2411.01433, 3.2).
    """

    high: float = 1.0
    low: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.high <= self.low <= 1:
            raise ValueError(f"thresholds T1={self.high}, T2={self.low}, allowed: 0 <= T1 <= T2 <= 1")

    @property
    def exact(self) -> bool:
        """Whether every expert is asked for in HIGH."""
        return self.high >= 1

    def precision(self, score: float) -> Precision:
        """What a score asks for."""
        if score <= self.high:
            return Precision.HIGH
        return Precision.LOW if score <= self.low else Precision.SKIP


def unimportance(weights: Tensor) -> Tensor:
    """Score of every chosen expert of every token: s_0 = 0, s_i = sum of w_j for j < i, with the token's weights [t, k]
    made positive, normalised to sum 1 and taken in descending order (equal ones in the order given); in float64.

    Source: Tang 2024, arXiv:2411.01433, 3.2. Routers whose weights do not sum to 1 are normalised for the score only.

    Raises: ValueError for weights that are not finite.
    """
    if not torch.isfinite(weights).all():
        raise ValueError("gate weights that are not finite have no order of importance")
    share = weights.detach().abs().double()
    total = share.sum(-1, keepdim=True)
    share = torch.where(total > 0, share / total, 1 / max(1, share.shape[-1]))
    ordered, order = share.sort(dim=-1, descending=True, stable=True)
    # rounding must not carry a sum over 1: T1 = 1 asks for everything
    before = (ordered.cumsum(-1) - ordered).clamp(0, 1)
    return torch.empty_like(before).scatter_(-1, order, before)


def wanted(ids: Tensor, weights: Tensor, thresholds: Thresholds) -> dict[int, Precision]:
    """What a pass over some tokens asks of a layer: expert -> precision, experts ascending.

    ids and weights are [t, k]. Where several tokens want one expert, the most important request decides (the paper
    has one token a pass).
    """
    if thresholds.exact:
        return dict.fromkeys(ids.unique().tolist(), Precision.HIGH)
    scores = unimportance(weights).flatten().tolist()
    return most_important(zip(ids.flatten().tolist(), scores, strict=True), thresholds)


def most_important(scored: Iterable[tuple[int, float]], thresholds: Thresholds) -> dict[int, Precision]:
    """expert -> precision by the smallest of its scores, experts ascending."""
    least: dict[int, float] = {}
    for expert, score in scored:
        least[expert] = min(score, least.get(expert, score))
    return {expert: thresholds.precision(least[expert]) for expert in sorted(least)}


def thresholds_for(scores: Sequence[float], high: float = 0.67, low: float = 0.30) -> Thresholds:
    """Thresholds that ask for a share `high` of all requests in HIGH and a share `low` in LOW, as nearly as the scores
    of a recorded trace allow; the paper's shares for Mixtral are the defaults.

    Raises: ValueError without scores, or for shares that are no shares.
    """
    if not scores:
        raise ValueError("no scores to choose thresholds from: the trace has no requests")
    if min(high, low) < 0 or high + low > 1 + 1e-9:
        raise ValueError(f"shares high={high}, low={low}, allowed: not negative, together at most 1")
    ordered = sorted(scores)

    def quantile(share: float) -> float:
        if share >= 1 - 1e-9:
            return 1.0
        return ordered[max(0, round(share * len(ordered)) - 1)]

    first = quantile(high)
    return Thresholds(first, max(first, quantile(high + low)))

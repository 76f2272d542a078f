"""Selections: logits [t, e] -> `Routing`. Softmax, sorting and sums run in the logits' dtype (float32 at least)."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moestro.ops.order import largest
from moestro.routers.gates import gate as find
from moestro.routers.gates import shares
from moestro.routers.groups import EVERYWHERE, GroupLimit
from moestro.routing import Routing, SoftRouting, SparseRouting

# What logits may be standardised over.
NORM_DIMENSIONS = {"none": None, "layer": 1, "batch": 0}


class Select(nn.Module):
    """A rule that turns logits into a `Routing`. `causal`: a token's routing depends on it alone.

    A logit of -inf marks an expert that is not available: it gets no weight and, where experts are chosen, is not.
    Every token finds at least one that is.
    """

    causal: bool = True

    def forward(self, logits: Float[Tensor, "t e"]) -> Routing:
        raise NotImplementedError

    def check(self, n_experts: int) -> None:
        """Raise ValueError where this selection is impossible with `n_experts` available experts."""

    def check_available(self, available: Bool[Tensor, "e"]) -> None:
        """Raise ValueError where it is impossible with these experts alone: by default, with so many."""
        self.check(int(available.sum()))

    def reindex(self, index: Int[Tensor, "m"]) -> None:
        """What it knows of new expert j is that of the old expert `index[j]`; -1 makes a fresh one."""

    def most_experts(self, n_experts: int) -> int:
        """Experts that any token could be given, however many it asks for."""
        return n_experts

    def rows_per_token(self, n_experts: int) -> float:
        """Rows a token costs when all probabilities are equal."""
        raise NotImplementedError

    def choices(self, n_experts: int) -> tuple[int | None, bool, tuple[str, ...]]:
        """Most experts a token can get (None: no limit), whether it always gets so many, and what makes the choice
        another than that of the best set of linear scores (`routers.family`)."""
        return None, False, (f"{type(self).__name__} does not choose a set of best scores",)


class TopK(Select):
    """The k experts of largest logits; gates are their probabilities, renormalised to sum to 1 unless told otherwise.

    Wang 2024, arXiv:2408.10681, Eq. 8: softmax over all experts first. Ties go to the lower expert index. With k = 1
    the renormalised gate is the constant 1, and the router learns from objectives only. Other gates are those of
    `GATES`, such as independent sigmoids (Csordas 2023, arXiv:2310.10837); `limit` confines a token to its best groups
    of experts; `scale` multiplies all gates (DeepSeek-V2, arXiv:2405.04434).
    """

    def __init__(
        self,
        top_k: int,
        renormalize: bool = True,
        gate: str = "softmax",
        limit: GroupLimit = EVERYWHERE,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        if top_k < 1:
            raise ValueError(f"top_k={top_k}, allowed: at least 1")
        if not scale > 0:
            raise ValueError(f"scale={scale}, allowed: above 0")
        find(gate)
        self.top_k, self.renormalize, self.gate, self.limit, self.scale = top_k, renormalize, gate, limit, scale

    def check(self, n_experts: int) -> None:
        if self.top_k > n_experts:
            raise ValueError(f"top_k={self.top_k} > {n_experts} experts")

    def check_available(self, available: Bool[Tensor, "e"]) -> None:
        super().check_available(available)
        self.limit.check(len(available), self.top_k, available)

    def most_experts(self, n_experts: int) -> int:
        return self.limit.most_experts(n_experts)

    def forward(self, logits: Float[Tensor, "t e"]) -> SparseRouting:
        # of the logits: probabilities of available experts, too, may round to 0
        gate = find(self.gate)
        scores = gate.scores(logits)
        expert = largest(self.limit(logits, scores), self.top_k)
        gates = scores.gather(1, expert)
        if self.renormalize:
            gates = shares(gates)
        return SparseRouting.from_topk(expert, self.scale * gates, logits.shape[1], gate.shown(logits), raw=logits)

    def rows_per_token(self, n_experts: int) -> float:
        return self.top_k

    def choices(self, n_experts: int) -> tuple[int | None, bool, tuple[str, ...]]:
        return self.top_k, True, ("experts are limited to groups",) if self.limit.limits else ()


class SoftmaxOfChosen(TopK):
    """The k experts of largest logits; gates are the softmax of the k chosen logits alone (GraniteMoE, gpt-oss).

    The same numbers as `TopK` but for rounding, which here is that of the models made so. Ties go to the lower expert.
    """

    def __init__(self, top_k: int) -> None:
        super().__init__(top_k)

    def forward(self, logits: Float[Tensor, "t e"]) -> SparseRouting:
        expert = largest(logits, self.top_k)
        return SparseRouting.from_topk(expert, logits.gather(1, expert).softmax(-1), logits.shape[1], logits)


class MutedTopK(TopK):
    """Top-k in which the `muted` experts are chosen like others but have gate 0 and no part in the gates' sum.

    For MoE++'s zero expert (Jin 2024, arXiv:2410.07348; its code): a token that chooses it is served by the rest of its
    choice alone, whose gates sum to 1. A token that chooses only muted experts gets gates of 0.
    """

    def __init__(self, top_k: int, muted: Sequence[int]) -> None:
        super().__init__(top_k)
        self.muted = tuple(muted)

    def reindex(self, index: Int[Tensor, "m"]) -> None:
        self.muted = tuple(new for new, old in enumerate(index.tolist()) if old in self.muted)

    def forward(self, logits: Float[Tensor, "t e"]) -> SparseRouting:
        """Raises: ValueError where a muted expert is none of these."""
        if not all(0 <= muted < logits.shape[1] for muted in self.muted):
            raise ValueError(f"muted={list(self.muted)}, allowed: experts 0 to {logits.shape[1] - 1}")
        expert, gates = super().forward(logits).matrix()
        silent = torch.isin(expert, torch.tensor(self.muted, dtype=expert.dtype, device=expert.device))
        return SparseRouting.from_topk(expert, shares(gates.masked_fill(silent, 0.0)), logits.shape[1], logits)


class TopP(Select):
    """The fewest most probable experts whose probabilities reach `threshold`; at least one.

    Wang 2024, arXiv:2408.10681, Eqs. 9-11 (gates renormalised over the chosen); with `renormalize=False` the gates are
    the raw probabilities, and with `strict=True` the sum must exceed the threshold, both as in the code of Huang 2024,
    arXiv:2403.07652. threshold <= 0 is exactly top-1, >= 1 exactly all available experts.
    """

    def __init__(self, threshold: float, renormalize: bool = True, strict: bool = False) -> None:
        super().__init__()
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold={threshold}, allowed: between 0 and 1")
        self.threshold, self.renormalize, self.strict = threshold, renormalize, strict

    def forward(self, logits: Float[Tensor, "t e"]) -> SparseRouting:
        expert = logits.sort(dim=-1, descending=True, stable=True).indices
        probabilities = logits.softmax(-1).gather(1, expert)
        chosen = self._chosen(probabilities) & (logits.gather(1, expert) > -math.inf)
        gates = probabilities * chosen
        if self.renormalize:
            gates = shares(gates)
        token, rank = chosen.nonzero(as_tuple=True)
        return SparseRouting(token, expert[token, rank], gates[token, rank], len(logits), logits.shape[1], logits)

    def _chosen(self, probabilities: Tensor) -> Tensor:
        """Which experts are chosen, where each token's stand by falling probability."""
        if self.threshold >= 1:
            return torch.ones_like(probabilities, dtype=torch.bool)
        before = F.pad(probabilities.detach().cumsum(-1)[:, :-1], (1, 0))
        chosen = before <= self.threshold if self.strict else before < self.threshold
        chosen[:, 0] = True
        return chosen

    def rows_per_token(self, n_experts: int) -> float:
        reached = self.threshold * n_experts
        return min(n_experts, math.floor(reached) + 1) if self.strict else max(1, math.ceil(reached))


class Soft(Select):
    """Every expert on every token, weighted by the softmax of the logits (Jacobs 1991), or by another of `GATES`. An
    expert that is not available computes its rows all the same, for weights of 0.

    With `norm` logits are standardised first, over the available experts and without scale or shift: `layer` over a
    token's experts, `batch` over an expert's tokens, (z - mean) / sqrt(variance + norm_eps) (Oldfield 2024, muMoE,
    arXiv:2402.12550, with gate `entmax15`). Batch statistics are always those of the batch at hand, and not causal.
    """

    def __init__(
        self, gate: str = "softmax", norm: Literal["none", "layer", "batch"] = "none", norm_eps: float = 1e-5
    ) -> None:
        super().__init__()
        find(gate)
        if norm not in NORM_DIMENSIONS:
            raise ValueError(f"norm={norm!r}, allowed: {', '.join(NORM_DIMENSIONS)}")
        if not norm_eps > 0:
            raise ValueError(f"norm_eps={norm_eps}, allowed: above 0")
        self.gate, self.norm, self.norm_eps = gate, norm, norm_eps

    @property
    def causal(self) -> bool:  # type: ignore[override]
        return self.norm != "batch"

    def forward(self, logits: Float[Tensor, "t e"]) -> SoftRouting:
        gate, dimension, raw = find(self.gate), NORM_DIMENSIONS[self.norm], logits
        if dimension is not None:
            logits = standardized(logits, dimension, self.norm_eps)
        return SoftRouting((gate.scores(logits),), gate.shown(logits), raw)

    def rows_per_token(self, n_experts: int) -> float:
        return n_experts

    def choices(self, n_experts: int) -> tuple[int | None, bool, tuple[str, ...]]:
        return n_experts, True, ()


def standardized(logits: Float[Tensor, "t e"], dimension: int, eps: float) -> Float[Tensor, "t e"]:
    """(z - mean) / sqrt(variance + eps) along a dimension; -inf has no part in either and stays."""
    present = logits > -math.inf
    count = present.sum(dimension, keepdim=True).clamp(min=1)
    z = logits.masked_fill(~present, 0.0)
    centred = (z - z.sum(dimension, keepdim=True) / count).masked_fill(~present, 0.0)
    variance = centred.square().sum(dimension, keepdim=True) / count
    return (centred * (variance + eps).rsqrt()).masked_fill(~present, -math.inf)

"""Selections: logits [t, e] -> `Routing`. Softmax, sorting and sums run in the logits' dtype (float32 at least)."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from moestro.routing import Routing, SoftRouting, SparseRouting


class Select:
    """A rule that turns logits into a `Routing`; has no parameters. `causal`: a token's routing depends on it alone."""

    causal: bool = True

    def __call__(self, logits: Float[Tensor, "t e"]) -> Routing:
        raise NotImplementedError

    def check(self, n_experts: int) -> None:
        """Raise ValueError where this selection is impossible with `n_experts` experts."""

    def rows_per_token(self, n_experts: int) -> float:
        """Rows a token costs when all probabilities are equal."""
        raise NotImplementedError


class TopK(Select):
    """The k most probable experts; gates are their probabilities, renormalised to sum to 1 unless told otherwise.

    Wang 2024, arXiv:2408.10681, Eq. 8: softmax over all experts first. Ties go to the lower expert index. With k = 1
    the renormalised gate is the constant 1, and the router learns from objectives only.
    """

    def __init__(self, top_k: int, renormalize: bool = True) -> None:
        if top_k < 1:
            raise ValueError(f"top_k={top_k}, allowed: at least 1")
        self.top_k, self.renormalize = top_k, renormalize

    def check(self, n_experts: int) -> None:
        if self.top_k > n_experts:
            raise ValueError(f"top_k={self.top_k} > {n_experts} experts")

    def __call__(self, logits: Float[Tensor, "t e"]) -> SparseRouting:
        probabilities, expert = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        gates = probabilities[:, : self.top_k]
        if self.renormalize:
            gates = gates / gates.sum(-1, keepdim=True)
        return SparseRouting.from_topk(expert[:, : self.top_k].contiguous(), gates, logits.shape[1], logits)

    def rows_per_token(self, n_experts: int) -> float:
        return self.top_k


class TopP(Select):
    """The fewest most probable experts whose probabilities reach `threshold`; at least one.

    Wang 2024, arXiv:2408.10681, Eqs. 9-11 (gates renormalised over the chosen); with `renormalize=False` the gates are
    the raw probabilities (Huang 2024, arXiv:2403.07652). threshold <= 0 is exactly top-1, >= 1 exactly all experts.
    """

    def __init__(self, threshold: float, renormalize: bool = True) -> None:
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold={threshold}, allowed: between 0 and 1")
        self.threshold, self.renormalize = threshold, renormalize

    def __call__(self, logits: Float[Tensor, "t e"]) -> SparseRouting:
        n_tokens, n_experts = logits.shape
        probabilities, expert = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        if self.threshold >= 1:
            chosen = torch.ones_like(expert, dtype=torch.bool)
        else:
            chosen = probabilities.cumsum(-1) - probabilities < self.threshold
            chosen[:, 0] = True
        gates = probabilities * chosen
        if self.renormalize:
            gates = gates / gates.sum(-1, keepdim=True)
        token, rank = chosen.nonzero(as_tuple=True)
        return SparseRouting(token, expert[token, rank], gates[token, rank], n_tokens, n_experts, logits)

    def rows_per_token(self, n_experts: int) -> float:
        return max(1, math.ceil(self.threshold * n_experts))


class Soft(Select):
    """Every expert on every token, weighted by the softmax of the logits (Jacobs 1991)."""

    def __call__(self, logits: Float[Tensor, "t e"]) -> SoftRouting:
        return SoftRouting((logits.softmax(-1),), logits)

    def rows_per_token(self, n_experts: int) -> float:
        return n_experts

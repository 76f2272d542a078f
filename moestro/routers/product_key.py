"""Product-key retrieval: the k best of n*n experts for the price of 2n scores."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moestro.cost import Kept
from moestro.ops import linear_fp32, product_key_topk
from moestro.ops.few_queries import few_product_keys, few_queries, retrieves_few
from moestro.ops.precision import without_autocast
from moestro.routers.base import Router
from moestro.routers.family import SelectionFamily, size_of
from moestro.routers.query_norm import QUERY_NORMS
from moestro.routing import SparseRouting

GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda scores: scores.softmax(-1),
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
}


class ProductKeyRouter(Router):
    """k experts for each of h heads, by the sum of two sub-key scores (He 2024, arXiv:2407.04153, section 2).

    Expert i*n + j answers to the pair (key i of the first side, key j of the second). As in the paper, all heads
    share experts and keys (`shared_keys=False` gives each head its own, as Lample 2019 and public code do), queries
    are batch-normalised (`query_norm="qk_rms"` normalises keys, too), and gates are a softmax over the k scores of each
    head, so that they sum to h. `sigmoid` and `relu` gates of a score depend on no other score (Csordas 2023,
    arXiv:2310.10837, section 6.2); ReLU gates of a token, or of an expert, may all be 0, which leaves the token zeros
    and those keys without a gradient. Arithmetic is float32 at least. `routing.logits` is None: a matrix over all
    experts never exists.
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        heads: int,
        top_k: int,
        d_key: int,
        shared_keys: bool = True,
        query_norm: Literal["batch", "layer", "rms", "qk_rms", "none"] = "batch",
        gate: Literal["softmax", "sigmoid", "relu"] = "softmax",
    ) -> None:
        super().__init__()
        side = math.isqrt(n_experts)
        _check(n_experts, side, heads, top_k, d_key, gate)
        self.n_experts, self.side, self.heads, self.top_k, self.gate = n_experts, side, heads, top_k, gate
        self.query = nn.Parameter(torch.empty(heads * d_key, d_model))
        self.query_norm = QUERY_NORMS[query_norm](heads, d_key)
        self.keys = nn.Parameter(torch.empty(2, 1 if shared_keys else heads, side, d_key // 2))
        nn.init.normal_(self.query, std=d_model**-0.5)
        nn.init.uniform_(self.keys, -((d_key // 2) ** -0.5), (d_key // 2) ** -0.5)

    @property
    def most_experts(self) -> int:
        return self.side

    def forward(self, x: Float[Tensor, "t d"]) -> SparseRouting:
        if not self.training and retrieves_few(len(x), x, *self.parameters()):
            return self._of_few(x)
        raw = linear_fp32(x, self.query)
        query, stats = self.query_norm(raw)
        with without_autocast(x):
            keys = self.query_norm.of_keys(self.keys.to(query.dtype))
            scores, ids = product_key_topk(query.unflatten(-1, (self.heads, -1)), keys, self.top_k)
        gates = GATES[self.gate](scores)
        return SparseRouting.from_topk(ids.flatten(1), gates.flatten(1), self.n_experts, query_stats=stats)

    def _of_few(self, x: Float[Tensor, "t d"]) -> SparseRouting:
        norm = self.query_norm.by_feature()
        query = few_queries(x, self.query, norm)
        if norm is None:
            query, _ = self.query_norm(query)
        keys, query = self.query_norm.of_keys(self.keys), query.unflatten(-1, (self.heads, -1))
        rows = few_product_keys(query, keys, self.top_k, self.gate)
        return SparseRouting(*rows, len(x), self.n_experts, fixed=self.heads * self.top_k)

    def reindex(self, index: Int[Tensor, "m"]) -> None:
        """Product keys have no key of a single expert, so experts cannot be moved one by one."""
        raise ValueError("experts behind product keys cannot be reindexed: expert i*n+j is named by its pair of keys")

    def selection_family(self) -> SelectionFamily:
        remarks = ("product keys: each head is linear in pairs of keys, parameters are counted",)
        most = min(self.n_experts, self.heads * self.top_k)
        return SelectionFamily(self.n_experts, self.n_experts, most, False, size_of(self), remarks)

    def flops(self, n_tokens: int) -> float:
        """Query and sub-key products; comparisons and the k*k candidate sums are not multiplied."""
        keys = 2.0 * self.heads * self.side * self.keys.shape[-1] * 2
        return n_tokens * (2.0 * self.query.numel() + keys)

    def kept_per_token(self) -> Kept:
        """float32 queries before, inside and after their norm; of every row its two positions, id, score, gate."""
        return Kept(bytes=12.0 * len(self.query) + 40.0 * self.rows_per_token())

    def rows_per_token(self) -> float:
        return self.heads * self.top_k


def _check(n_experts: int, side: int, heads: int, top_k: int, d_key: int, gate: str) -> None:
    if side * side != n_experts or side < 1:
        raise ValueError(f"n_experts={n_experts} is not a square; nearest: {side**2} and {(side + 1) ** 2}")
    if heads < 1:
        raise ValueError(f"heads={heads}, allowed: at least 1")
    if not 1 <= top_k <= side:
        raise ValueError(f"top_k={top_k}, allowed: 1 to {side} (the square root of n_experts={n_experts})")
    if d_key < 2 or d_key % 2:
        raise ValueError(f"d_key={d_key}, allowed: an even number, at least 2 (half of it meets each side's keys)")
    if gate not in GATES:
        raise ValueError(f"gate={gate!r}, allowed: {', '.join(GATES)}")
    if top_k == 1 and gate == "softmax":
        raise ValueError(
            "top_k=1 with gate='softmax': the gate is the constant 1, so queries and keys get no gradient;"
            " use gate='sigmoid', gate='relu' or top_k >= 2"
        )

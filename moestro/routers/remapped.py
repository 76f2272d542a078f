"""`RemappedRouter`: a router of experts of which some have become one, or are gone."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moestro.routers.base import Router
from moestro.routing import Routing, SparseRouting


class RemappedRouter(Router):
    """Another router's decision, with expert `answers[i]` in place of its expert i; with -1, nobody answers.

    All old experts keep their part in the choice, and a token that chose several that have become one gets it once,
    with the sum of their gates (merged experts under "remap": MC-SMoE, arXiv:2310.01334, and HC-SMoE,
    arXiv:2410.08589; -1 is a zeroed expert, whose gate is not given to others). The routing has no logits, because
    none belong to the new experts alone. The buffer `answers` is kept by checkpoints.

    Raises: ValueError where `answers` does not name one new expert, or -1, for every old one, or leaves a new expert
    without an old one; in `forward`, where the router does not give tokens rows of their own.
    """

    answers: Tensor

    def __init__(self, router: Router, answers: Sequence[int]) -> None:
        super().__init__()
        n_experts = max(answers, default=-1) + 1
        if len(answers) != router.n_experts or set(answers) - {-1} != set(range(n_experts)) or not n_experts:
            raise ValueError(
                f"answers={list(answers)}, allowed: for each of {router.n_experts} experts one of 0, 1, ..., m, each "
                "at least once, or -1"
            )
        self.router, self.n_experts = router, n_experts
        self.register_buffer("answers", torch.tensor(list(answers)))

    @property
    def causal(self) -> bool:  # type: ignore[override]
        return self.router.causal

    @property
    def follows(self) -> bool:  # type: ignore[override]
        return self.router.follows

    def forward(self, x: Float[Tensor, "t d"], earlier: Routing | None = None) -> SparseRouting:
        routing = self.router(x, earlier) if self.follows else self.router(x)
        if not isinstance(routing, SparseRouting):
            raise ValueError(f"{type(self.router).__name__} gives tokens no rows of their own to answer for")
        expert = self.answers[routing.expert]
        there = expert >= 0
        places = routing.token[there] * self.n_experts + expert[there]
        rows, row_of = places.unique(return_inverse=True)
        weight = routing.weight.new_zeros(len(rows)).index_add(0, row_of, routing.weight[there])
        return SparseRouting(rows // self.n_experts, rows % self.n_experts, weight, routing.n_tokens, self.n_experts)

    def reindex(self, index: Int[Tensor, "m"]) -> None:
        """Answers follow their experts; nobody asks a fresh one, and nobody answers for one that is gone."""
        new = torch.full((self.n_experts + 1,), -1, dtype=torch.int64, device=index.device)
        old = index >= 0
        new[index[old]] = torch.arange(len(index), device=index.device)[old]
        self.answers = new[self.answers]
        self.n_experts = len(index)

    def flops(self, n_tokens: int) -> float:
        return self.router.flops(n_tokens)

    def rows_per_token(self) -> float:
        return self.router.rows_per_token()

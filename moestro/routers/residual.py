"""`ResidualRouter`: what a token chose in the layer before has a say in what it chooses here."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moestro.ops import linear_fp32
from moestro.ops.reindexed import normal_like, reindexed
from moestro.routers.base import ScoredRouter
from moestro.routers.scores import Score
from moestro.routers.selects import Select
from moestro.routing import Routing


class ResidualRouter(ScoredRouter):
    """logits_l = score(x) + M_l logits_{l-1}, routing = select(logits_l); the first layer has no second term (Jin 2024,
    MoE++, arXiv:2410.07348, its gating residual).

    M is [e, e] for the experts of this layer and of the one before, which must be as many; it starts normal with
    standard deviation `residual_std` (not stated). In the first layer M is there, counted and unused. Experts of the
    layer before that were not available have no say.
    """

    follows = True

    def __init__(
        self, score: Score, select: Select, first_available: int | None = None, residual_std: float = 0.02
    ) -> None:
        super().__init__(score, select, first_available)
        if not residual_std >= 0:
            raise ValueError(f"residual_std={residual_std}, allowed: 0 or above")
        self.residual_std = residual_std
        self.residual = nn.Parameter(torch.empty(score.n_experts, score.n_experts))
        nn.init.normal_(self.residual, std=residual_std)

    def forward(self, x: Float[Tensor, "t d"], earlier: Routing | None = None) -> Routing:
        """Raises: ValueError where the layer before has no logits, or other tokens or another number of experts."""
        logits = self.score(x)
        if earlier is not None:
            logits = logits + linear_fp32(self._logits(earlier, len(x)), self.residual)
        return self.routed(logits)

    def _logits(self, earlier: Routing, n_tokens: int) -> Float[Tensor, "t f"]:
        needed, logits = (n_tokens, self.residual.shape[1]), earlier.raw_logits()
        if logits is None or logits.shape != needed:
            have = None if logits is None else list(logits.shape)
            raise ValueError(
                f"the gating residual needs logits {list(needed)} of the layer before, got {have}: every layer must "
                "route the same tokens over as many experts"
            )
        return logits.masked_fill(logits == -math.inf, 0.0)

    def reindex(self, index: Int[Tensor, "m"]) -> None:
        """Rows of M move with their experts, fresh ones are drawn; columns belong to the layer before."""
        super().reindex(index)
        fresh = normal_like(self.residual, len(index)) * self.residual_std
        self.residual = nn.Parameter(reindexed(self.residual, index, fresh))

    def flops(self, n_tokens: int) -> float:
        return super().flops(n_tokens) + 2.0 * n_tokens * self.residual.numel()

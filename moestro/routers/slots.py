"""Soft MoE: experts compute slots, which are mixtures of all tokens."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from moestro.ops import linear_fp32
from moestro.ops.precision import at_least_fp32
from moestro.routers.base import Router
from moestro.routers.scores import LinearScore
from moestro.routing import SlotRouting


class SlotRouter(Router):
    """dispatch = softmax over tokens, merge = softmax over slots of x . phi (Puigcerver 2023, arXiv:2308.00951).

    Not causal: every slot mixes all tokens of the batch, so a causal language model refuses it. With `normalized`, x
    and phi have length 1 and a learned scale, as in the authors' code: logits = scale * cos(x, phi).
    """

    causal = False

    def __init__(self, d_model: int, n_experts: int, slots: int = 1, normalized: bool = False) -> None:
        super().__init__()
        if slots < 1:
            raise ValueError(f"slots={slots}, allowed: at least 1")
        self.slots = slots
        self.score = LinearScore(d_model, n_experts * slots, init_std=d_model**-0.5)
        self.scale = nn.Parameter(torch.ones(())) if normalized else None

    @property
    def n_experts(self) -> int:  # type: ignore[override]
        return self.score.n_experts // self.slots

    def forward(self, x: Float[Tensor, "t d"]) -> SlotRouting:
        logits = self._logits(x)
        shape = (self.n_experts, self.slots)
        merge = logits.softmax(-1).unflatten(1, shape)
        return SlotRouting(logits.softmax(0).unflatten(1, shape), merge, logits.unflatten(1, shape).amax(-1))

    def _logits(self, x: Float[Tensor, "t d"]) -> Float[Tensor, "t _"]:
        if self.scale is None:
            return self.score(x)
        directions = F.normalize(at_least_fp32(self.score.weight), dim=-1, eps=1e-6)
        cosine = linear_fp32(F.normalize(at_least_fp32(x), dim=-1, eps=1e-6), directions)
        return at_least_fp32(self.scale) * cosine

    def reindex(self, index: Int[Tensor, "m"]) -> None:
        columns = (index[:, None] * self.slots + index.new_tensor(range(self.slots))).where(index[:, None] >= 0, -1)
        self.score.reindex(columns.flatten())

    def flops(self, n_tokens: int) -> float:
        d_model = self.score.weight.shape[1]
        return self.score.flops(n_tokens) + 4.0 * n_tokens * self.score.n_experts * d_model

    def rows_per_token(self) -> float:
        raise ValueError("a slot router computes n_experts * slots rows a batch, not rows a token")

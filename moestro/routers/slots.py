"""Soft MoE: experts compute slots, which are mixtures of all tokens."""

from jaxtyping import Float, Int
from torch import Tensor

from moestro.routers.base import Router
from moestro.routers.scores import LinearScore
from moestro.routing import SlotRouting


class SlotRouter(Router):
    """dispatch = softmax over tokens, merge = softmax over slots of x . phi (Puigcerver 2023, arXiv:2308.00951).

    Not causal: every slot mixes all tokens of the batch, so a causal language model refuses it. The paper's L2
    normalisation of inputs and phi is left out.
    """

    causal = False

    def __init__(self, d_model: int, n_experts: int, slots: int = 1) -> None:
        super().__init__()
        if slots < 1:
            raise ValueError(f"slots={slots}, allowed: at least 1")
        self.slots = slots
        self.score = LinearScore(d_model, n_experts * slots, init_std=d_model**-0.5)

    @property
    def n_experts(self) -> int:  # type: ignore[override]
        return self.score.n_experts // self.slots

    def forward(self, x: Float[Tensor, "t d"]) -> SlotRouting:
        logits = self.score(x)
        shape = (self.n_experts, self.slots)
        merge = logits.softmax(-1).unflatten(1, shape)
        return SlotRouting(logits.softmax(0).unflatten(1, shape), merge, logits.unflatten(1, shape).amax(-1))

    def reindex(self, index: Int[Tensor, "m"]) -> None:
        columns = (index[:, None] * self.slots + index.new_tensor(range(self.slots))).where(index[:, None] >= 0, -1)
        self.score.reindex(columns.flatten())

    def flops(self, n_tokens: int) -> float:
        d_model = self.score.weight.shape[1]
        return self.score.flops(n_tokens) + 4.0 * n_tokens * self.score.n_experts * d_model

    def rows_per_token(self) -> float:
        raise ValueError("a slot router computes n_experts * slots rows a batch, not rows a token")

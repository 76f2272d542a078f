"""`TopAny`: every token takes as many experts as pass their own thresholds."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moestro.ops.reindexed import reindexed
from moestro.routers.selects import Select
from moestro.routing import SparseRouting

GREATEST_SHARPNESS = 100.0


class TopAny(Select):
    """Every expert whose logit exceeds its threshold, all k of a token with weight 1 / k (Guo 2024, DynMoE,
    arXiv:2405.14297, section 3.1; meant for cosine logits of temperature 1).

    In training a token may have no expert; in evaluation it then has the one of greatest logit, with weight 1.

    Gates are 1 and decided by logit c_e > threshold G_e. Their gradient is straight-through: that of
    s_e - theta_e = sigmoid(a c_e) - sigmoid(a G_e) for chosen pairs and none for others (computing it for others, as
    the paper's text does, would take every expert's output; its code does not either). The sharpness a changes
    gradients and no decision; `learn_sharpness` trains its logarithm, capped at a = 100.

    `gradient` says how it passes the division by k. `constant`: k is a number, so that dL/d(s - theta) = dL/dy .
    FFN_e(x) / k (the paper's DeepSpeed code). `normalized`: weights are g / sum g, so that the gradients of a token's
    gates sum to 0, and with k = 1 there is none (its Tutel code). `thresholds` [e] start at 0.

    Raises: ValueError for impossible values.
    """

    def __init__(
        self,
        n_experts: int,
        gradient: str = "constant",
        sharpness: float = 1.0,
        learn_sharpness: bool = False,
    ) -> None:
        super().__init__()
        if gradient not in ("constant", "normalized"):
            raise ValueError(f"gradient={gradient!r}, allowed: constant, normalized")
        if not 0 < sharpness <= GREATEST_SHARPNESS:
            raise ValueError(f"sharpness={sharpness}, allowed: above 0, at most {GREATEST_SHARPNESS:g}")
        self.gradient = gradient
        self.thresholds = nn.Parameter(torch.zeros(n_experts))
        self.log_sharpness: Tensor
        # a constant has its value on the meta device, too
        log = torch.tensor(math.log(sharpness), device=None if learn_sharpness else "cpu")
        if learn_sharpness:
            self.log_sharpness = nn.Parameter(log)
        else:
            self.register_buffer("log_sharpness", log, persistent=False)

    def forward(self, logits: Float[Tensor, "t e"]) -> SparseRouting:
        n_tokens, n_experts = logits.shape
        chosen = logits.detach() > self.thresholds.detach().to(logits.dtype)
        if not self.training:
            best = torch.arange(n_experts, device=logits.device) == logits.argmax(-1, keepdim=True)
            chosen = chosen | (best & ~chosen.any(-1, keepdim=True))
        token, expert = chosen.nonzero(as_tuple=True)
        gate = self.gates(logits[token, expert], expert)
        total = chosen.sum(-1).to(gate.dtype)
        if self.gradient == "normalized":
            total = gate.new_zeros(n_tokens).index_add(0, token, gate)
        return SparseRouting(token, expert, gate / total[token], n_tokens, n_experts, logits)

    def gates(self, logit: Float[Tensor, "n"], expert: Int[Tensor, "n"]) -> Float[Tensor, "n"]:
        """1 for every chosen pair, with the straight-through gradient."""
        sharpness = self.log_sharpness.clamp(max=math.log(GREATEST_SHARPNESS)).exp().to(logit.dtype)
        margin = (sharpness * logit).sigmoid() - (sharpness * self.thresholds.to(logit.dtype)[expert]).sigmoid()
        return 1 + (margin - margin.detach())

    def reindex(self, index: Int[Tensor, "m"]) -> None:
        """Thresholds move with their experts; a fresh expert's is 0."""
        self.thresholds = nn.Parameter(reindexed(self.thresholds, index, 0.0))

    def rows_per_token(self, n_experts: int) -> float:
        """Half of the experts: a cosine with a random vector is as often above 0 as below."""
        return n_experts / 2

"""`SparseMixer`: two experts, each weighted by its share of the logits that come close to it (Phi-3.5-MoE)."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moestro.routers.selects import Select
from moestro.routing import SparseRouting


class SparseMixer(Select):
    """Two experts one after the other: each is the best of those that are left, and its gate is its softmax among the
    logits that are near it: (best - z) / max(|z|, best) <= 2 jitter (Liu 2024, GRIN, arXiv:2409.12136, with k = 2 as in
    Phi-3.5-MoE; the first expert is left out of the second's softmax). Gates do not sum to 1.

    While training, an expert is drawn from those near the best in proportion to their softmax, and gates are divided by
    3 for three quarters of the draws that are not the best (Heun's third-order estimate of the gradient; gradients are
    those of the softmax all the same). Numbers come from torch's default generator of the device; a third is 0.3333, as
    in the models' own code.
    """

    def __init__(self, jitter: float = 0.01) -> None:
        super().__init__()
        if not jitter >= 0:
            raise ValueError(f"jitter={jitter}, allowed: 0 or more")
        self.jitter = jitter

    def check(self, n_experts: int) -> None:
        if n_experts < 2:
            raise ValueError(f"two experts of {n_experts}, allowed: at least 2 experts")

    def forward(self, logits: Float[Tensor, "t e"]) -> SparseRouting:
        first, first_gate = self._one(logits, logits)
        second, second_gate = self._one(logits.scatter(-1, first, -math.inf), logits)
        expert, gates = torch.cat([first, second], -1), torch.cat([first_gate, second_gate], -1)
        return SparseRouting.from_topk(expert, gates, logits.shape[1], logits)

    def _one(
        self, left: Float[Tensor, "t e"], logits: Float[Tensor, "t e"]
    ) -> tuple[Int[Tensor, "t 1"], Float[Tensor, "t 1"]]:
        """An expert of those that are left, and its gate."""
        best, expert = left.detach().max(dim=-1, keepdim=True)
        far = (best - logits.detach()) / logits.detach().abs().clamp(min=best) > 2 * self.jitter
        near = left.masked_fill(far, -math.inf)
        if self.training:
            noise = torch.empty_like(near).exponential_().log()
            expert = (near.detach() - noise).argmax(-1, keepdim=True)
        shares = near.softmax(-1)
        gate = shares.gather(-1, expert)
        if not self.training:
            return expert, gate
        whole = (expert == shares.argmax(-1, keepdim=True)) | (torch.rand_like(gate) > 0.75)
        factor = torch.where(whole, 1.0, 0.3333).to(gate)
        # the value is scaled, its gradient is not
        return expert, (gate * factor).detach() + (gate - gate.detach())

    def rows_per_token(self, n_experts: int) -> float:
        return 2

    def choices(self, n_experts: int) -> tuple[int | None, bool, tuple[str, ...]]:
        return 2, True, ("experts are drawn while the router trains",)

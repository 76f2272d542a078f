"""The router that does not look: every expert on every token, all weighted alike."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moestro.routers.base import Router
from moestro.routing import SoftRouting


class UniformRouter(Router):
    """weight[t, e] = 1 / n_experts. Learns nothing: the control of a soft mixture, and what can be merged exactly."""

    def __init__(self, d_model: int, n_experts: int) -> None:
        super().__init__()
        if n_experts < 1:
            raise ValueError(f"n_experts={n_experts}, allowed: at least 1")
        self.n_experts = n_experts

    def forward(self, x: Float[Tensor, "t d"]) -> SoftRouting:
        dtype = torch.promote_types(x.dtype, torch.float32)
        return SoftRouting((torch.full((len(x), self.n_experts), 1 / self.n_experts, device=x.device, dtype=dtype),))

    def reindex(self, index: Int[Tensor, "m"]) -> None:
        self.n_experts = len(index)

    def flops(self, n_tokens: int) -> float:
        return 0.0

    def rows_per_token(self) -> float:
        return self.n_experts

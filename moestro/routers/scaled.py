"""`ScaledTopK`: gates for experts that are parts of one function, whose outputs add up instead of being averaged."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from moestro.ops.order import largest
from moestro.routers.selects import TopK
from moestro.routing import SparseRouting

# p [t, k] of the chosen experts and the number of experts there are -> gates whose mean is 1 at equal probabilities
UNIT_GATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "hard": lambda p, n: torch.ones_like(p).detach(),
    "straight_through": lambda p, n: 1 + (p - p.detach()),
    "share": lambda p, n: p.shape[1] * p / p.sum(-1, keepdim=True),
    "softmax": lambda p, n: n * p,
}


class ScaledTopK(TopK):
    """The k experts of largest logits with gates of mean `scale` where `TopK`'s have the sum 1: experts that are slices
    of one feed-forward network must be added up (Zhao 2024, FactorLLM, arXiv:2408.11855).

    `hard`: every gate is `scale`, as in the paper's code, and no gradient of what the layer computes reaches the
    router; `straight_through`: the same values with the gradient of the probability p; `share`: scale k p / (sum of the
    chosen p); `softmax`: scale n p of n experts, softmax before the choice. The gradient of a straight-through gate
    wants scale <dL/dy, E_i> for p_i. `scale` is 1, n / k, or what fits the dense network best (`moestro.convert`).
    """

    def __init__(self, top_k: int, gate: str = "straight_through", scale: float = 1.0) -> None:
        super().__init__(top_k)
        if gate not in UNIT_GATES:
            raise ValueError(f"gate={gate!r}, allowed: {', '.join(UNIT_GATES)}")
        if not scale > 0:
            raise ValueError(f"scale={scale}, allowed: above 0")
        self.gate, self.scale = gate, scale

    def forward(self, logits: Float[Tensor, "t e"]) -> SparseRouting:
        # of the logits: probabilities of available experts, too, may round to 0
        expert = largest(logits, self.top_k)
        available = (logits > -torch.inf).sum(-1, keepdim=True)
        gates = UNIT_GATES[self.gate](logits.softmax(-1).gather(1, expert), available)
        return SparseRouting.from_topk(expert, self.scale * gates, logits.shape[1], logits)

"""`SkippingTopK`: top-k that spends fewer experts on a token whose first one has most of the gates."""

from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from moestro.routers.gates import shares
from moestro.routers.groups import EVERYWHERE, GroupLimit
from moestro.routers.selects import TopK
from moestro.routing import SparseRouting


class SkippingTopK(TopK):
    """Top-k without the experts whose gate is below `skip_below` of the token's first one; the gates of the others
    grow to the same sum (Lu 2024, arXiv:2402.14800, dynamic skipping, whose k is 2 and whose gates sum to 1).

    Raises: ValueError for a share outside of 0 to below 1.
    """

    def __init__(
        self,
        top_k: int,
        skip_below: float,
        renormalize: bool = True,
        gate: str = "softmax",
        limit: GroupLimit = EVERYWHERE,
        scale: float = 1.0,
    ) -> None:
        super().__init__(top_k, renormalize, gate, limit, scale)
        if not 0 <= skip_below < 1:
            raise ValueError(f"skip_below={skip_below}, allowed: 0 to below 1")
        self.skip_below = skip_below

    def forward(self, logits: Float[Tensor, "t e"]) -> SparseRouting:
        routing = super().forward(logits)
        gates = routing.weight.view(len(logits), -1)
        stays = gates >= self.skip_below * gates[:, :1]
        weight = shares(gates * stays) * gates.sum(-1, keepdim=True)
        return replace(routing, weight=weight.flatten()).keep(stays.flatten())

    def choices(self, n_experts: int) -> tuple[int | None, bool, tuple[str, ...]]:
        return self.top_k, False, ("experts whose gate is far below the first one's are left out",)

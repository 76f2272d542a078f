"""`FreeAdapters`: a small expert more beside every expert, with weights of its own."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from moestro.cost import Cost
from moestro.ops.reindexed import reindexed
from moestro.routing import Routing, SparseRouting


class FreeAdapters(nn.Module):
    """y_t = sum over the experts e chosen for token t of relu(x_t D_e + a_e) U_e + b_e, weighted by no gate.

    The control of HyperMoE (Zhao 2024, arXiv:2402.12656): with top-1, a `HyperExpert` is such adapters tied by one
    generator. D starts uniform within d^-0.5, all else at 0, so that nothing is added at the start.
    """

    def __init__(self, d_model: int, n_experts: int, rank: int = 64) -> None:
        super().__init__()
        if min(n_experts, rank) < 1:
            raise ValueError(f"n_experts={n_experts}, rank={rank}, allowed: at least 1")
        self.rank = rank
        self.down = nn.Parameter((2 * torch.rand(n_experts, rank, d_model) - 1) * d_model**-0.5)
        self.down_bias = nn.Parameter(torch.zeros(n_experts, rank))
        self.up = nn.Parameter(torch.zeros(n_experts, d_model, rank))
        self.up_bias = nn.Parameter(torch.zeros(n_experts, d_model))

    @property
    def n_experts(self) -> int:
        return len(self.down)

    def forward(self, x: Float[Tensor, "t d"], routing: Routing) -> Float[Tensor, "t d"]:
        """Raises: ValueError for routings in which all experts serve all tokens, or mixtures of them."""
        if not isinstance(routing, SparseRouting):
            raise ValueError(f"free adapters belong to the experts chosen; {type(routing).__name__} chooses none")
        routing = routing.grouped()
        groups = routing.gather(x).split(routing.offsets.diff().tolist())
        weights = zip(groups, self.down, self.down_bias, self.up, self.up_bias, strict=True)
        rows = torch.cat([F.linear(F.relu(F.linear(z, d, a)), u, b) for z, d, a, u, b in weights])
        return torch.zeros_like(x, dtype=rows.dtype).index_add(0, routing.token, rows)

    def reindex(self, index: Int[Tensor, "m"]) -> None:
        """Make new expert j's adapter that of the old expert `index[j]`; -1 makes a fresh one."""
        fresh = FreeAdapters(self.down.shape[2], len(index), self.rank)
        for name, new in fresh.named_parameters():
            setattr(self, name, nn.Parameter(reindexed(getattr(self, name), index, new)))

    def expected_token_flops(self, rows_per_token: float = 1.0) -> float:
        """Forward FLOPs of a token that meets so many experts."""
        return rows_per_token * 4.0 * self.rank * self.down.shape[2]

    def flops(self, routing: Routing) -> Cost:
        """Forward FLOPs of the rows in `routing`."""
        return Cost.exact(routing.n_rows * self.expected_token_flops())

"""Linear experts of low rank, from one width to another."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moestro.experts.base import ExpertBank
from moestro.experts.norms import ExpertNorms, norms_of
from moestro.ops.reindexed import reindexed
from moestro.routing import Routing, SoftRouting


class LowRankBank(ExpertBank):
    """e_n(x) = B_n A_n x, `down` = A [e, r, i] and `up` = B [e, r, o] (Wu 2023, Omni-SMoLA, arXiv:2312.00968; one
    expert is a LoRA, Hu 2021, arXiv:2106.09685).

    A starts uniform within i^-0.5, as LoRA's does, and B with standard deviation `up_std`, 0 for experts that change
    nothing yet. `d_in` and `d_out` are d_model where not given. Width is the rank. Where every expert serves every
    token, all are one product with A, one gate a rank, and one product with B.
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        rank: int = 4,
        d_in: int | None = None,
        d_out: int | None = None,
        up_std: float = 0.0,
    ) -> None:
        super().__init__()
        self.d_in, self.d_out = d_model if d_in is None else d_in, d_model if d_out is None else d_out
        if min(n_experts, rank, self.d_in, self.d_out) < 1 or up_std < 0:
            raise ValueError(
                f"n_experts={n_experts}, rank={rank}, d_in={self.d_in}, d_out={self.d_out}, up_std={up_std}, "
                "allowed: at least 1, up_std at least 0"
            )
        self.rank, self.up_std = rank, up_std
        self.down = nn.Parameter(self._fresh_down(n_experts))
        self.up = nn.Parameter(self._fresh_up(n_experts))

    def _fresh_down(self, n: int) -> Tensor:
        return (2 * torch.rand(n, self.rank, self.d_in) - 1) * self.d_in**-0.5

    def _fresh_up(self, n: int) -> Tensor:
        return torch.randn(n, self.rank, self.d_out) * self.up_std

    @property
    def n_experts(self) -> int:  # type: ignore[override]
        return len(self.down)

    def run(self, z: Float[Tensor, "n i"], offsets: Int[Tensor, "e1"]) -> Float[Tensor, "n o"]:
        groups = zip(z.split(offsets.diff().tolist()), self.down, self.up, strict=True)
        return torch.cat([rows @ down.T @ up for rows, down, up in groups])

    def forward(self, x: Float[Tensor, "t i"], routing: Routing) -> Float[Tensor, "t o"]:
        if not isinstance(routing, SoftRouting):
            return super().forward(x, routing)
        hidden = x @ self.down.flatten(0, 1).T
        gates = routing.dense().repeat_interleave(self.rank, dim=1)
        return (hidden * gates.to(hidden.dtype)) @ self.up.flatten(0, 1)

    def matrices(self) -> Float[Tensor, "e o i"]:
        """B_n A_n of every expert."""
        return self.up.mT @ self.down

    def reindex(self, index: Int[Tensor, "m"]) -> None:
        self.down = nn.Parameter(reindexed(self.down, index, self._fresh_down(len(index))))
        self.up = nn.Parameter(reindexed(self.up, index, self._fresh_up(len(index))))

    def weights_of(self, expert: int) -> tuple[tuple[nn.Parameter, slice], ...]:
        own = slice(expert, expert + 1)
        return (self.down, own), (self.up, own)

    def norms(self) -> ExpertNorms:
        return norms_of([(down, up.T) for down, up in zip(self.down, self.up, strict=True)], ())

    def row_flops(self) -> float:
        return 2.0 * self.rank * (self.d_in + self.d_out)

    def row_widths(self) -> float:
        return float(self.rank)

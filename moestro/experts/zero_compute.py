"""Experts that cost next to nothing: a token may be passed on, or answered by a learned vector."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moestro.experts.base import ExpertBank
from moestro.ops.precision import at_least_fp32
from moestro.ops.reindexed import normal_like, reindexed


class CopyBank(ExpertBank):
    """Experts e(x) = x: the token skips the layer, scaled by its gate (Jin 2024, MoE++, arXiv:2410.07348, section 3.1).

    No parameters, no FLOPs, width 0. (The paper's zero expert, e(x) = 0, is an expert of width 0 in `FFNBank`.)
    """

    def __init__(self, n_experts: int = 1) -> None:
        super().__init__()
        if n_experts < 1:
            raise ValueError(f"n_experts={n_experts}, allowed: at least 1")
        self.n_experts = n_experts

    def run(self, z: Float[Tensor, "n d"], offsets: Int[Tensor, "e1"]) -> Float[Tensor, "n d"]:
        return z

    def weights_of(self, expert: int) -> tuple[tuple[nn.Parameter, slice], ...]:
        return ()

    def reindex(self, index: Int[Tensor, "m"]) -> None:
        """Copies are all alike: only their number changes."""
        self.n_experts = len(index)

    def row_flops(self) -> float:
        return 0.0

    def row_widths(self) -> float:
        return 0.0


class ConstantBank(ExpertBank):
    """Experts e_i(x) = a_1 x + a_2 v_i, (a_1, a_2) = softmax(W_i x): the token is replaced, in part, by a learned
    vector v_i in R^d; W_i is 2 x d (Jin 2024, MoE++, arXiv:2410.07348, section 3.1).

    v starts standard normal, as in the paper's code; W, for which it leaves the framework's default, normal with
    standard deviation d_model^-0.5. Width 0; 6 d FLOPs a row (W x and a_2 v, a multiply-add for each of 3 d
    parameters; scaling x counts as little as a gate does). The softmax runs in float32 at least.
    """

    def __init__(self, d_model: int, n_experts: int = 1) -> None:
        super().__init__()
        if n_experts < 1:
            raise ValueError(f"n_experts={n_experts}, allowed: at least 1")
        self.weight = nn.Parameter(torch.empty(n_experts, 2, d_model))
        self.vector = nn.Parameter(torch.empty(n_experts, d_model))
        nn.init.normal_(self.weight, std=d_model**-0.5)
        nn.init.normal_(self.vector)

    @property
    def n_experts(self) -> int:  # type: ignore[override]
        return len(self.vector)

    def run(self, z: Float[Tensor, "n d"], offsets: Int[Tensor, "e1"]) -> Float[Tensor, "n d"]:
        groups = zip(z.split(offsets.diff().tolist()), self.weight, self.vector, strict=True)
        return torch.cat([_mixed(rows, weight, vector) for rows, weight, vector in groups])

    def weights_of(self, expert: int) -> tuple[tuple[nn.Parameter, slice], ...]:
        return tuple((parameter, slice(expert, expert + 1)) for parameter in (self.weight, self.vector))

    def reindex(self, index: Int[Tensor, "m"]) -> None:
        fresh = normal_like(self.weight, len(index)) * self.weight.shape[-1] ** -0.5
        self.weight = nn.Parameter(reindexed(self.weight, index, fresh))
        self.vector = nn.Parameter(reindexed(self.vector, index, normal_like(self.vector, len(index))))

    def row_flops(self) -> float:
        return 6.0 * self.vector.shape[1]

    def row_widths(self) -> float:
        return 0.0


def _mixed(x: Float[Tensor, "n d"], weight: Float[Tensor, "2 d"], vector: Float[Tensor, "d"]) -> Float[Tensor, "n d"]:
    share = at_least_fp32(x @ weight.to(x.dtype).T).softmax(-1).to(x.dtype)
    return share[:, :1] * x + share[:, 1:] * vector.to(x.dtype)

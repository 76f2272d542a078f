"""Scores: one logit for every expert and token, in float32 at least."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from moestro.ops import linear_fp32
from moestro.ops.precision import at_least_fp32
from moestro.ops.reindexed import normal_like, reindexed


class Score(nn.Module):
    """Tokens -> logits [t, e] through one weight row for each expert.

    Rows start normal with standard deviation `init_std`; with `orthogonal`, of length 1 and at right angles.

    Raises: ValueError for impossible values.
    """

    def __init__(self, d_model: int, n_experts: int, init_std: float = 0.02, orthogonal: bool = False) -> None:
        super().__init__()
        if n_experts < 1:
            raise ValueError(f"n_experts={n_experts}, allowed: at least 1")
        if orthogonal and n_experts > d_model:
            raise ValueError(f"n_experts={n_experts} rows cannot be orthogonal, allowed: up to d_model={d_model}")
        self.init_std, self.orthogonal = init_std, orthogonal
        self.weight = nn.Parameter(torch.empty(n_experts, d_model))
        if orthogonal:
            nn.init.orthogonal_(self.weight)
        else:
            nn.init.normal_(self.weight, std=init_std)

    @property
    def n_experts(self) -> int:
        """Number of logits."""
        return len(self.weight)

    linear: bool = False

    def forward(self, x: Float[Tensor, "t d"]) -> Float[Tensor, "t e"]:
        raise NotImplementedError

    def reindex(self, index: Int[Tensor, "m"]) -> None:
        """Make row j the old row `index[j]`; -1 draws a fresh one, of length 1 where rows started so."""
        fresh = normal_like(self.weight, len(index))
        fresh = F.normalize(fresh, dim=-1) if self.orthogonal else fresh * self.init_std
        self.weight = nn.Parameter(reindexed(self.weight, index, fresh))

    def flops(self, n_tokens: int) -> float:
        """Forward FLOPs."""
        return 2.0 * n_tokens * self.weight.numel()


class LinearScore(Score):
    """logit_te = w_e . x_t (Wang 2024, arXiv:2408.10681, Eq. 7)."""

    linear = True

    def forward(self, x: Float[Tensor, "t d"]) -> Float[Tensor, "t e"]:
        return linear_fp32(x, self.weight)


class AffineScore(LinearScore):
    """logit_te = w_e . x_t + b_e, biases from 0 (gpt-oss; the router of FactorLLM, Zhao 2024, arXiv:2408.11855)."""

    def __init__(self, d_model: int, n_experts: int, init_std: float = 0.02) -> None:
        super().__init__(d_model, n_experts, init_std)
        self.bias = nn.Parameter(torch.zeros(n_experts))

    def forward(self, x: Float[Tensor, "t d"]) -> Float[Tensor, "t e"]:
        return linear_fp32(x, self.weight, self.bias)

    def reindex(self, index: Int[Tensor, "m"]) -> None:
        super().reindex(index)
        self.bias = nn.Parameter(reindexed(self.bias, index, 0.0))


class NoisyScore(LinearScore):
    """logit_te = w_e . x_t + noise, in training: noise = N(0, 1) softplus(v_e . x_t) (Shazeer 2017, arXiv:1701.06538,
    Eq. 4; with `TopK` the noisy top-k routing of MoDSE, arXiv:2409.12210). In evaluation the first term alone.

    v starts at 0, so that the noise starts with standard deviation log 2. Numbers are drawn from torch's default
    generator of the device, which training seeds and checkpoints keep.
    """

    linear = False

    def __init__(self, d_model: int, n_experts: int, init_std: float = 0.02) -> None:
        super().__init__(d_model, n_experts, init_std)
        self.spread = nn.Parameter(torch.zeros(n_experts, d_model))

    def forward(self, x: Float[Tensor, "t d"]) -> Float[Tensor, "t e"]:
        logits = super().forward(x)
        if not self.training:
            return logits
        return logits + torch.randn_like(logits) * F.softplus(linear_fp32(x, self.spread))

    def reindex(self, index: Int[Tensor, "m"]) -> None:
        super().reindex(index)
        self.spread = nn.Parameter(reindexed(self.spread, index, 0.0))

    def flops(self, n_tokens: int) -> float:
        return super().flops(n_tokens) + 2.0 * n_tokens * self.spread.numel()


class CosineScore(Score):
    """logit_te = cos(w_e, x_t) / temperature (Chi 2022, arXiv:2204.09179; its low-dimensional projection left out)."""

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        temperature: float = 0.1,
        init_std: float = 0.02,
        orthogonal: bool = False,
    ) -> None:
        super().__init__(d_model, n_experts, init_std, orthogonal)
        if not temperature > 0:
            raise ValueError(f"temperature={temperature}, allowed: above 0")
        self.temperature = temperature

    def forward(self, x: Float[Tensor, "t d"]) -> Float[Tensor, "t e"]:
        direction = F.normalize(at_least_fp32(x), dim=-1)
        return linear_fp32(direction, F.normalize(at_least_fp32(self.weight), dim=-1)) / self.temperature


class LowRankCosineScore(Score):
    """logit_te = cos(v_e, A x_t) / tau: A [r, d] projects tokens into r dimensions, tau is learned, or fixed where
    `learn_temperature` is false (Chi 2022, X-MoE, arXiv:2204.09179, Eqs. 4-5; not XMoE).

    tau starts at `temperature` and is kept at 1e-4 at least; v starts orthogonal with gain 0.1 and A normal with
    standard deviation d^-0.5, norms that a cosine does not see. Fresh experts' v are random directions.
    """

    def __init__(
        self, d_model: int, n_experts: int, rank: int = 32, temperature: float = 0.07, learn_temperature: bool = True
    ) -> None:
        if rank < 1:
            raise ValueError(f"rank={rank}, allowed: at least 1")
        if not temperature > 0:
            raise ValueError(f"temperature={temperature}, allowed: above 0")
        super().__init__(rank, n_experts, init_std=0.1 * rank**-0.5)
        self.project = nn.Parameter(torch.empty(rank, d_model))
        self.temperature = nn.Parameter(torch.tensor(temperature), requires_grad=learn_temperature)
        nn.init.normal_(self.project, std=d_model**-0.5)
        nn.init.orthogonal_(self.weight, gain=0.1)

    def forward(self, x: Float[Tensor, "t d"]) -> Float[Tensor, "t e"]:
        direction = F.normalize(linear_fp32(x, self.project), dim=-1)
        cosine = linear_fp32(direction, F.normalize(at_least_fp32(self.weight), dim=-1))
        return cosine / at_least_fp32(self.temperature).clamp(min=1e-4)

    def flops(self, n_tokens: int) -> float:
        return super().flops(n_tokens) + 2.0 * n_tokens * self.project.numel()

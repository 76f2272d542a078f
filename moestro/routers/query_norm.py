"""Normalisations of retrieval: queries [t, f] -> (normalised queries, batch statistics or None), f = heads * d_key."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from moestro.ops.few_queries import FeatureNorm
from moestro.ops.precision import at_least_fp32

Statistics = tuple[Tensor, Tensor, int]
ONE_TOKEN = "query batch norm needs at least 2 tokens in a training batch, got 1"


class QueryNorm(nn.Module):
    """Returns the normalised queries and, where it normalises over the batch, (mean, variance, count)."""

    def __init__(self, heads: int, d_key: int) -> None:
        super().__init__()
        self.features, self.d_half = heads * d_key, d_key // 2

    def forward(self, query: Float[Tensor, "t f"]) -> tuple[Float[Tensor, "t f"], Statistics | None]:
        return query, None

    def of_keys(self, keys: Float[Tensor, "2 g n half"]) -> Float[Tensor, "2 g n half"]:
        """The sub-keys that the queries meet: as they are, but where keys are normalised too."""
        return keys

    def by_feature(self) -> FeatureNorm | None:
        """What it does in evaluation, where that is the same for every token and feature by feature."""
        return None


class BatchQueryNorm(QueryNorm):
    """Per feature over all tokens of the batch, learned affine (He 2024, arXiv:2407.04153, section 2.3).

    In training the statistics mix future tokens into a token's query, as in the paper; in evaluation the running
    statistics (of the biased variance) are used and a token depends on itself alone. `forward` never changes them: it
    returns the batch's, and a rule calls `update`, once a step, so that recomputation and repeated forwards count
    nothing.

    Where several processes train on parts of one batch, `together` is set from above to a function that sums a tensor
    over all of them, and gradients with it: the statistics, forward and backward, are then those of the whole batch.
    Each process must come here as often, also without tokens; what it returns counts its own queries only.

    Raises: ValueError for a training batch of one token, that of all processes together, on each of them; RuntimeError
    in evaluation before any update.
    """

    together: Callable[[Tensor], Tensor] | None = None

    updates: Tensor
    mean: Tensor
    variance: Tensor

    def __init__(self, heads: int, d_key: int, eps: float = 1e-5) -> None:
        super().__init__(heads, d_key)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(self.features))
        self.bias = nn.Parameter(torch.zeros(self.features))
        self.register_buffer("mean", torch.zeros(self.features))
        self.register_buffer("variance", torch.ones(self.features))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        # known to the host, so that it need not wait for the device in every evaluation to ask for `updates`
        self._updated = False

    def forward(self, query: Float[Tensor, "t f"]) -> tuple[Float[Tensor, "t f"], Statistics | None]:
        if not self.training:
            self._require_statistics()
            return self._normalise(query, self.mean, self.variance), None
        if self.together is not None:
            # also without queries, forward and backward: other processes wait for this one's sums
            mean, variance = _over_all(query, self.together)
        elif len(query) == 0:
            return query, None
        elif len(query) == 1:
            raise ValueError(ONE_TOKEN)
        else:
            mean, variance = query.mean(0), query.var(0, correction=0)
        stats = (mean.detach(), variance.detach(), len(query)) if len(query) else None
        return self._normalise(query, mean, variance), stats

    def by_feature(self) -> FeatureNorm:
        self._require_statistics()
        return FeatureNorm(self.mean, self.variance, self.weight, self.bias, self.eps)

    def _require_statistics(self) -> None:
        self._updated = self._updated or bool(self.updates)
        if not self._updated:
            raise RuntimeError(
                "query batch norm has no running statistics yet: train with the rule QueryNormStatistics "
                "(the training loop always does) or call `update` before evaluating"
            )

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self._updated = False
        super()._load_from_state_dict(*arguments)

    def _normalise(self, query: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        scale = self.weight.to(query.dtype) * (variance.to(query.dtype) + self.eps).rsqrt()
        return (query - mean.to(query.dtype)) * scale + self.bias.to(query.dtype)

    @torch.no_grad()
    def update(self, mean: Float[Tensor, "f"], variance: Float[Tensor, "f"], momentum: float = 0.1) -> None:
        """Move the running statistics towards one batch's; the first update replaces them."""
        rate = momentum if self.updates else 1.0
        self.mean.lerp_(mean.to(self.mean), rate)
        self.variance.lerp_(variance.to(self.variance), rate)
        self.updates += 1


def _over_all(query: Float[Tensor, "t f"], summed: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of the queries of all processes; sums about the mean, so that nothing cancels."""
    sums = summed(torch.cat([query.new_full((1,), len(query)), query.sum(0)]))
    # who has two tokens need not ask, and wait for the device
    if len(query) < 2 and int(sums[0]) == 1:
        raise ValueError(f"{ONE_TOKEN} on all ranks together")
    count = sums[0].clamp(min=1)
    mean = sums[1:] / count
    return mean, summed((query - mean).square().sum(0)) / count


class LayerQueryNorm(QueryNorm):
    """Layer normalisation of each token's whole query."""

    def __init__(self, heads: int, d_key: int) -> None:
        super().__init__(heads, d_key)
        self.norm = nn.LayerNorm(self.features)

    def forward(self, query: Float[Tensor, "t f"]) -> tuple[Float[Tensor, "t f"], None]:
        weight, bias = (parameter.to(query.dtype) for parameter in (self.norm.weight, self.norm.bias))
        return F.layer_norm(query, (self.features,), weight, bias, self.norm.eps), None


class RMSQueryNorm(QueryNorm):
    """Root-mean-square normalisation of each token's whole query."""

    def __init__(self, heads: int, d_key: int) -> None:
        super().__init__(heads, d_key)
        self.norm = nn.RMSNorm(self.features, eps=1e-6)

    def forward(self, query: Float[Tensor, "t f"]) -> tuple[Float[Tensor, "t f"], None]:
        return F.rms_norm(query, (self.features,), self.norm.weight.to(query.dtype), self.norm.eps), None


class QKRMSNorm(QueryNorm):
    """Root-mean-square normalisation of what meets in a score: each half of each head's query, times a learned gain for
    every feature, and each sub-key (query-key normalisation, as Memory+ has it where training is unstable: Berges 2024,
    arXiv:2412.09764). A score is then bounded by the gains, however long queries and keys grow.

    Gains start at (3/2 d_key)^-0.5, with which scores start with the variance that they have without: 1/3 a side.
    """

    def __init__(self, heads: int, d_key: int, eps: float = 1e-6) -> None:
        super().__init__(heads, d_key)
        self.eps = eps
        self.weight = nn.Parameter(torch.full((self.features,), (3 * self.d_half) ** -0.5))

    def forward(self, query: Float[Tensor, "t f"]) -> tuple[Float[Tensor, "t f"], None]:
        halves = F.rms_norm(query.unflatten(-1, (-1, self.d_half)), (self.d_half,), eps=self.eps)
        return halves.flatten(-2) * self.weight.to(query.dtype), None

    def of_keys(self, keys: Float[Tensor, "2 g n half"]) -> Float[Tensor, "2 g n half"]:
        return F.rms_norm(at_least_fp32(keys), (self.d_half,), eps=self.eps)


QUERY_NORMS: dict[str, type[QueryNorm]] = {
    "batch": BatchQueryNorm,
    "layer": LayerQueryNorm,
    "rms": RMSQueryNorm,
    "qk_rms": QKRMSNorm,
    "none": QueryNorm,
}

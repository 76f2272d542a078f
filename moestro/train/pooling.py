"""Mean and variance of several samples together, on one rank or over all of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moestro.parallel.sums import summed_over_ranks

# Mean [f], biased variance [f] and count of a sample.
Sample = tuple[Tensor, Tensor, int]


@torch.no_grad()
def pooled(samples: Sequence[Sample]) -> tuple[Tensor, Tensor] | None:
    """Mean and (biased) variance of all samples together; None where there are none."""
    if len(samples) <= 1:
        return samples[0][:2] if samples else None
    means = torch.stack([mean.double() for mean, _, _ in samples])
    variances = torch.stack([variance.double() for _, variance, _ in samples])
    share = torch.tensor([count for _, _, count in samples], dtype=torch.float64, device=means.device)[:, None]
    share = share / share.sum()
    mean = (share * means).sum(0)
    return mean, (share * (variances + (means - mean) ** 2)).sum(0)


@torch.no_grad()
def pooled_over_ranks(samples: Sequence[Sample], like: Tensor) -> tuple[Tensor, Tensor] | None:
    """`pooled` of the samples of all ranks, the same on each. Every rank must call it, also one without a sample;
    `like` is of the samples' shape and on their device."""
    own = pooled(samples)
    mean, variance = (torch.zeros_like(like, dtype=torch.float64),) * 2 if own is None else (v.double() for v in own)
    count = mean.new_tensor([sum(count for _, _, count in samples)])
    sums = summed_over_ranks(torch.cat([count, count * mean]))
    total, everyones = sums[0], sums[1:] / sums[0]
    if not total:
        return None
    # about the mean of all, not of squares, so that nothing cancels
    spread = summed_over_ranks(count * (variance + (mean - everyones) ** 2))
    return everyones, spread / total

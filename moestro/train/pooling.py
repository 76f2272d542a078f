"""Sums, and mean and variance of several samples together, on one rank or over all of them."""

from collections.abc import Sequence

import torch
import torch.distributed
from torch import Tensor

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


def n_ranks() -> int:
    """Processes that train the same model."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if there else 1


def several_ranks() -> bool:
    """Whether other processes train the same model."""
    return n_ranks() > 1


@torch.no_grad()
def summed_over_ranks(own: Tensor) -> Tensor:
    """The sum of all ranks' tensors, the same on each. Every rank must call it."""
    total = own.clone()
    if several_ranks():
        torch.distributed.all_reduce(total)
    return total


@torch.no_grad()
def pooled_over_ranks(samples: Sequence[Sample], like: Tensor) -> tuple[Tensor, Tensor] | None:
    """`pooled` of the samples of all ranks, the same on each. Every rank must call it, also one without a sample;
    `like` is of the samples' shape and on their device."""
    own = pooled(samples)
    mean, variance = (torch.zeros_like(like, dtype=torch.float64),) * 2 if own is None else (v.double() for v in own)
    count = mean.new_tensor([sum(count for _, _, count in samples)])
    sums = torch.cat([count, count * mean])
    torch.distributed.all_reduce(sums)
    total, everyones = sums[0], sums[1:] / sums[0]
    if not total:
        return None
    # about the mean of all, not of squares, so that nothing cancels
    spread = count * (variance + (mean - everyones) ** 2)
    torch.distributed.all_reduce(spread)
    return everyones, spread / total

"""Sums over ranks that gradients flow through, and rows that every rank is shown."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def summed(tensor: Tensor, group: Any = None) -> Tensor:
    """The sum of all ranks' tensors; as every rank uses it, its gradient is the sum of theirs."""
    return _Sums.apply(tensor, group, True, True)  # type: ignore[return-value]


def sum_going_forward(tensor: Tensor, group: Any = None) -> Tensor:
    """The sum of all ranks' tensors, where every rank goes on alike, so that each has the whole gradient."""
    return _Sums.apply(tensor, group, True, False)  # type: ignore[return-value]


def sum_going_back(tensor: Tensor, group: Any = None) -> Tensor:
    """A tensor that is the same on all ranks, which go on differently: its gradient is the sum of theirs."""
    return _Sums.apply(tensor, group, False, True)  # type: ignore[return-value]


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, group, forward, backward):  # type: ignore[override]
        ctx.group, ctx.backward = group, backward
        return _sum(tensor, group) if forward else tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):  # type: ignore[override]
        return _sum(gradient, ctx.group) if ctx.backward else gradient, None, None, None


def _sum(tensor: Tensor, group: Any) -> Tensor:
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def shown(rows: Tensor, counts: list[int], group: Any = None) -> Tensor:
    """The rows of all ranks, rank after rank, `counts[r]` from rank r. Every rank must come to the same gradient of
    them, of which this one takes its own rows."""
    return _Shown.apply(rows, counts, group)  # type: ignore[return-value]


class _Shown(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, counts, group):  # type: ignore[override]
        first = sum(counts[: dist.get_rank(group)])
        ctx.mine = slice(first, first + len(rows))
        # one size for all: backends gather no others
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        everyones = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(everyones, padded, group=group)
        return torch.cat([part[:count] for part, count in zip(everyones, counts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):  # type: ignore[override]
        return gradient[ctx.mine], None, None

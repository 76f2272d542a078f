"""Gradients over several ranks: when they are sent, those that FSDP does not send, and their common norm."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moestro.parallel.layout import is_sharded, local, own_layout
from moestro.parallel.ranks import Ranks


def send_after_backward(model: Any, last: bool) -> None:
    """Say before a backward pass whether gradients are sent after it: only after the step's last micro-batch. Before
    that they are summed where they are, and gathered weights are kept. A model that is not sharded is left alone."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_is_last_backward(last)
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last)


def forget_gathered(model: nn.Module, ranks: Ranks) -> None:
    """Let go of weights that a forward pass without backward has gathered, so that parameters are shards again."""
    if ranks.several:
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


@torch.no_grad()
def sum_gradients(parameters: Iterable[nn.Parameter], ranks: Ranks) -> None:
    """Sum the gradients of what FSDP leaves alone over the ranks that hold the same: single numbers over all, experts
    over their copies. Every rank calls it after the step's last backward pass; no gradient counts as 0."""
    if not ranks.several:
        return
    for parameter in parameters:
        layout = own_layout(parameter)
        if is_sharded(parameter) or not parameter.requires_grad or (layout is not None and layout.copies is None):
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad, group=None if layout is None else layout.copies)


@torch.no_grad()
def common_norm(parameters: Sequence[Tensor], rows: Sequence[tuple[Tensor, Tensor]], ranks: Ranks) -> Tensor:
    """The 2-norm of all gradients of all ranks together, each counted once however many ranks hold it: of the `grad` of
    `parameters`, and of `rows`, tables with the norms of their gradients on this rank. Every rank must call it."""
    squares = torch.zeros((), dtype=torch.float32, device=ranks.device)
    for parameter in parameters:
        if parameter.grad is not None:
            squares += torch.linalg.vector_norm(local(parameter.grad)).float().square() / n_holders(parameter, ranks)
    for table, norm in rows:
        squares += norm.float().square() / n_holders(table, ranks)
    return ranks.summed(squares).sqrt()


def n_holders(parameter: Tensor, ranks: Ranks) -> int:
    """How many ranks hold the same part of a parameter as this one."""
    if is_sharded(parameter):
        mesh: Any = parameter.device_mesh  # type: ignore[attr-defined]
        shards = [mesh.size(dim) for dim, place in enumerate(parameter.placements) if place.is_shard()]  # type: ignore[attr-defined]
        return ranks.world // int(torch.tensor(shards).prod()) if shards else ranks.world
    layout = own_layout(parameter)
    return ranks.world if layout is None else layout.n_copies

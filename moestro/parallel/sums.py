"""What ranks add up, where there are several."""

import torch
import torch.distributed as dist
from torch import Tensor


def n_ranks() -> int:
    """Processes that train the same model."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def several_ranks() -> bool:
    """Whether other processes train the same model."""
    return n_ranks() > 1


@torch.no_grad()
def summed_over_ranks(own: Tensor) -> Tensor:
    """The sum of all ranks' tensors, the same on each. Every rank must call it."""
    total = own.clone()
    if several_ranks():
        dist.all_reduce(total)
    return total

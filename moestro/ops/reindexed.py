"""What moving experts does to every tensor that has an entry for each."""

import torch
from jaxtyping import Int, Shaped
from torch import Tensor


@torch.no_grad()
def reindexed(
    old: Shaped[Tensor, "e *n"], index: Int[Tensor, "m"], fresh: Shaped[Tensor, "..."] | float
) -> Shaped[Tensor, "m *n"]:
    """Entry j is `old[index[j]]`, or where `index[j]` is -1 entry j of `fresh`, which may be one number for all; dtype
    and device are those of `old`. No gradient passes."""
    index = index.to(old.device)
    kept = (index >= 0).view(-1, *[1] * (old.ndim - 1))
    return torch.where(kept, old.detach()[index.clamp(min=0)], torch.as_tensor(fresh).to(old))


def normal_like(old: Shaped[Tensor, "e *n"], n_experts: int) -> Shaped[Tensor, "m *n"]:
    """Standard normal numbers for so many entries of `old`, of its dtype and on its device."""
    return torch.randn(n_experts, *old.shape[1:], dtype=old.dtype, device=old.device)

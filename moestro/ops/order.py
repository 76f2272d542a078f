"""What routers sort: each token's best experts, and rows by their experts. Always in the order of a stable sort."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moestro.ops import backend
from moestro.ops.native import order as native_order

# Numbers that a kernel keeps of each row, which it goes through for every one that it finds.
MOST_KEPT = 32


def largest(values: Float[Tensor, "t e"], k: int) -> Int[Tensor, "t k"]:
    """Columns of the k largest numbers of each row (of all, where there are fewer), largest first; of equal ones the
    lower column comes first."""
    k = min(k, values.shape[1])
    if 1 <= k <= MOST_KEPT and values.dtype == torch.float32 and _runs_native(values):
        return native_order.largest(values, k)  # type: ignore[call-arg]
    return values.sort(dim=-1, descending=True, stable=True).indices[:, :k].contiguous()


def by_expert(expert: Int[Tensor, "n"], n_experts: int) -> tuple[Int[Tensor, "n"], Int[Tensor, "e1"]]:
    """Rows in the order of their experts, rows of the same in theirs, and where every expert's begin: bounds
    [n_experts + 1]."""
    if expert.dtype == torch.int64 and _runs_native(expert):
        return native_order.by_expert(expert, n_experts)  # type: ignore[call-arg]
    of, order = expert.sort(stable=True)
    # by search, because bincount makes the host wait for the device
    return order, torch.searchsorted(of, torch.arange(n_experts + 1, device=expert.device))


def _runs_native(v: Tensor) -> bool:
    """Compiled graphs sort: a kernel would break them in two."""
    return backend.active() == "native" and v.device.type == "cpu" and not torch.compiler.is_compiling()

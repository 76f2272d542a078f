"""What routers sort, on compiled kernels (`order.c`)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moestro.ops import native


@torch.compiler.disable
def largest(values: Float[Tensor, "t e"], k: int) -> Int[Tensor, "t k"]:
    """`ops.order.largest` of numbers in float32, k between 1 and e."""
    index = torch.empty(len(values), k, dtype=torch.int64)
    fields = values.detach().contiguous(), 0, index, 0, values.shape[1], k, 0, 0
    native.run("largest_of_rows", native.even_parts(len(values)), *fields)
    return index


@torch.compiler.disable
def by_expert(expert: Int[Tensor, "n"], n_experts: int) -> tuple[Int[Tensor, "n"], Int[Tensor, "e1"]]:
    """`ops.order.by_expert` of numbers in int64.

    Raises: ValueError for experts that there are not.
    """
    index, bounds = torch.empty_like(expert), torch.empty(n_experts + 1, dtype=torch.int64)
    native.run("order_by_expert", [0, 1], 0, expert.contiguous(), index, bounds, 0, 0, len(expert), n_experts)
    if int(bounds[-1]) != len(expert):
        raise ValueError(f"experts {int(expert.min())} to {int(expert.max())}, allowed: 0 to {n_experts - 1}")
    return index, bounds

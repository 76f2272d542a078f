"""Values of a table's gradient from its factors, on the kernel that sums segments (`table_rows.c`)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moestro.ops import native


def segment_values(
    order: Int[Tensor, "p"],
    starts: Int[Tensor, "n1"],
    source: Float[Tensor, "t d"],
    token: Int[Tensor, "p"],
    coefficient: Float[Tensor, "p"],
) -> Float[Tensor, "n d"]:
    """Row i = sum over j from starts[i] to starts[i + 1] of coefficient[order[j]] * source[token[j]], in float32."""
    n = len(starts) - 1
    out = torch.empty(n, source.shape[1])
    factors = source.contiguous().float(), token.contiguous(), coefficient.contiguous().float()
    native.run(
        "segment_sums", native.even_parts(n), order.contiguous(), starts, torch.arange(n), *factors, out, out.shape[1]
    )
    return out

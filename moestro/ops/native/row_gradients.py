"""Values of a table's gradient, or their norm, from its factors, on the kernels that sum segments (`table_rows.c`)."""

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


def segment_norm(
    order: Int[Tensor, "p"],
    starts: Int[Tensor, "n1"],
    source: Float[Tensor, "t d"],
    token: Int[Tensor, "p"],
    coefficient: Float[Tensor, "p"],
) -> Float[Tensor, ""]:
    """2-norm of all `segment_values`, which are not written down; the squares of the rows are added in float64."""
    n = len(starts) - 1
    source, coefficient = source.contiguous().float(), coefficient.contiguous().float()
    squares = torch.empty(n, dtype=torch.float64)
    # a row of one place has coefficient^2 times its token's
    each = torch.linalg.vector_norm(source, dim=1, dtype=squares.dtype).square()
    factors = order.contiguous(), starts, token.contiguous(), source, coefficient
    native.run("segment_squares", native.even_parts(n), *factors, each, squares, source.shape[1])
    return squares.sum().sqrt().float()

"""Gated experts with SiLU on few rows on compiled kernels (`few_rows.c`)."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moestro.ops import native

# Parts of an expert's units that threads take in turn; so many sums are kept for every row. Always the same, so that
# results do not depend on the number of threads.
CHUNKS = 8
# Columns of one piece of the last sum, as in `few_rows.c`.
COLUMNS = 64


def few_rows(
    x: Float[Tensor, "t d"],
    token: Int[Tensor, "n"],
    weight: Float[Tensor, "n"],
    bounds: Sequence[int],
    w_in: Float[Tensor, "gs d"],
    w_out: Float[Tensor, "s d"] | Float[Tensor, "e d w"],
    widths: Sequence[int],
) -> Float[Tensor, "t d"]:
    """`ops.expert_ffn` for `silu` and a gate where rows `bounds[e]:bounds[e+1]` are expert e's, without gradients and
    in float32 inside. Weights are read once for four rows of an expert, in the dtype and the layout in which they lie.

    Raises: ValueError for shapes, dtypes or tokens that do not go together.
    """
    d, units, stacked = x.shape[1], [0, *accumulate(widths)], w_out.ndim == 3
    allowed = (len(widths), d, max(widths, default=0)) if stacked else (units[-1], d)
    fits = w_in.shape == (2 * units[-1], d) and w_out.shape == allowed and w_out.numel() == units[-1] * d
    if not fits or w_in.dtype != w_out.dtype:
        raise ValueError(f"w_in {list(w_in.shape)}, w_out {list(w_out.shape)}, allowed: those of {units[-1]} units")
    if weight.shape != token.shape or bounds[-1] != len(token) or any(not 0 <= t < len(x) for t in token.tolist()):
        raise ValueError(f"{len(token)} tokens, {len(weight)} weights, allowed: {bounds[-1]} of {len(x)} tokens")
    met = [(a, b, u, v) for a, b, u, v in zip(bounds, bounds[1:], units, units[1:], strict=False) if b > a]
    y, part = torch.empty(len(x), d), torch.empty(len(token) * (1 if stacked else CHUNKS) * d)
    hidden = torch.empty(len(token) * allowed[-1] if stacked else 0)
    numbers = token.long().contiguous(), torch.tensor(met, dtype=torch.int64)
    tensors = w_in.contiguous(), w_out.contiguous(), x.float().contiguous(), weight.float().contiguous(), *numbers
    sizes = d, len(token), len(x), CHUNKS, int(stacked), int(w_in.dtype == torch.bfloat16)
    fields = *tensors, hidden, part, y, *sizes
    chunks = native.even_parts(CHUNKS * len(met))
    for kernel in ["few_rows", "few_rows_columns"] if stacked else ["few_rows"]:
        native.run(kernel, chunks, *fields)
    native.run("few_rows_sum", native.even_parts(-(-d // COLUMNS)), *fields)
    return y.to(x.dtype)

"""silu(gate) * up and its backward pass on compiled kernels (`glu.c`), one pass over the rows each.

They read and write rows in float32 or bfloat16 and compute in float32.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from moestro.ops import native


def swiglu(z: Float[Tensor, "n gw"], out: Float[Tensor, "n w"]) -> None:
    """Write silu(gate) * up to `out`, z = (gate, up) side by side."""
    # fields that only the backward pass reads
    unused = out
    fields = z, unused, unused, unused, out, unused
    native.run("swiglu", native.even_parts(len(z)), *fields, out.shape[1], int(z.dtype == torch.bfloat16))


def swiglu_backward(
    dhidden: Float[Tensor, "n w"],
    z: Float[Tensor, "n gw"],
    weight: Float[Tensor, "n"],
    dz: Float[Tensor, "n gw"],
    scaled: Float[Tensor, "n w"],
    dweight: Float[Tensor, "n"],
) -> None:
    """`ops.glu.hidden_backward` for silu and a gate."""
    fields = z, dhidden, weight, dz, scaled, dweight
    native.run("swiglu_backward", native.even_parts(len(z)), *fields, scaled.shape[1], int(z.dtype == torch.bfloat16))

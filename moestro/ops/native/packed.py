"""Products with a matrix in 8 or 4 bits on compiled kernels (`packed.c`): its codes are read as they are stored."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from moestro.ops import native

# Bytes of a group's codes come in multiples of this, the widest vector's.
BYTES = 16


def packs(bits: int, group_bytes: int) -> bool:
    """Whether the kernels are there, and read groups of codes like these."""
    return native.available() and bits in (4, 8) and group_bytes % BYTES == 0


def packed_linear(
    x: Float[Tensor, "n i"],
    codes: UInt8[Tensor, "o g b"],
    scale: Float[Tensor, "o g"],
    shift: Float[Tensor, "o g"],
    bits: int,
) -> Float[Tensor, "n o"]:
    """x W^T, with W = scale * code + shift of each group of a row: code j of a group of b bytes lies in byte j mod b,
    at bit `bits` (j div b). Groups reach beyond the last column, where x counts as 0. Computed in float32, in the dtype
    of x outside; the order of every sum is the same for any number of rows and threads.

    Raises: ValueError for shapes or dtypes that do not go together, and where `packs` says no.
    """
    o, groups, group_bytes = codes.shape
    if not packs(bits, group_bytes) or codes.dtype != torch.uint8:
        raise ValueError(f"{bits} bits in groups of {group_bytes} bytes ({codes.dtype}) are not read by the kernels")
    if scale.shape != (o, groups) or shift.shape != (o, groups):
        raise ValueError(f"scale {list(scale.shape)}, shift {list(shift.shape)}, allowed: {[o, groups]}")
    if scale.dtype != shift.dtype or scale.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"scale in {scale.dtype}, shift in {shift.dtype}, allowed: both in float32 or bfloat16")
    columns = groups * group_bytes * 8 // bits
    if not 0 <= columns - x.shape[1] < columns // groups:
        raise ValueError(f"x has {x.shape[1]} columns, allowed: those of {groups} groups of {columns // groups}")
    wide = F.pad(x.float(), (0, columns - x.shape[1])).contiguous()
    sums, out = wide.view(len(x), groups, columns // groups).sum(-1), torch.empty(len(x), o)
    tensors = codes.contiguous(), scale.contiguous(), shift.contiguous(), wide, sums, out
    narrow = int(scale.dtype == torch.bfloat16)
    native.run("packed_linear", native.even_parts(o), *tensors, len(x), o, groups, group_bytes, bits, narrow)
    return out.to(x.dtype)

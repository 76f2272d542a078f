"""Stochastic rounding whose random bits are a function of what is rounded, not of a generator's state."""

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor

_GOLDEN = 0x9E3779B9
_MULTIPLIERS = (0x7FEB352D, 0x846CA68B)
_BITS = 0xFFFFFFFF


def rounding_key(*numbers: int) -> int:
    """A 32-bit key that differs for different (step, table, entry)."""
    key = 0
    for number in numbers:
        key = _scrambled((key + _GOLDEN + number) & _BITS)
    return key


def stochastic_bfloat16(x: Float[Tensor, "n d"], ids: Int[Tensor, "n"], key: int) -> Float[Tensor, "n d"]:
    """Rows `ids` of a table in float32, each number rounded to one of its two neighbours in bfloat16 with the
    probability that makes it right on average (Gupta 2015, arXiv:1502.02551, Eq. 1).

    The random bits are a hash (C. Wellons' lowbias32) of the key, the row's id and the column: the same in every
    process, on every device, in pieces of any size, so that training that was interrupted continues to the last bit.
    Changes far below bfloat16's precision, as optimizers make, then add up instead of being lost. NaN stays NaN.
    """
    x = x.float()
    rounded = ((x.view(torch.int32) + (_random_bits(ids, x.shape[1], key) & 0xFFFF)) & ~0xFFFF).view(torch.float32)
    # the NaN of some devices has all bits set, to which nothing can be added
    return torch.where(x.isnan(), x, rounded).bfloat16()


def stochastic_int8(x: Float[Tensor, "n d"], ids: Int[Tensor, "n"], key: int) -> Int8[Tensor, "n d"]:
    """`stochastic_bfloat16` to whole numbers, of numbers from -127 to 127, with 16 random bits; what is no number
    becomes 0."""
    noise = (_random_bits(ids, x.shape[1], key) & 0xFFFF) * 2.0**-16
    return (x.float() + noise).floor().nan_to_num(0.0).to(torch.int8)


def stochastic_float8(x: Float[Tensor, "n d"], ids: Int[Tensor, "n"], key: int) -> Float[Tensor, "n d"]:
    """`stochastic_bfloat16` to float8 (e4m3fn), of numbers from -448 to 448, with 20 random bits, or 16 below 2^-6,
    where neighbours are 2^-9 apart."""
    x, bits = x.float(), _random_bits(ids, x.shape[1], key)
    size = x.abs()
    normal = ((size.view(torch.int32) + (bits & 0xFFFFF)) & ~0xFFFFF).view(torch.float32)
    small = (size * 512 + (bits & 0xFFFF) * 2.0**-16).floor() / 512
    rounded = torch.where(size < 2.0**-6, small, normal).copysign(x)
    return torch.where(x.isnan(), x, rounded).to(torch.float8_e4m3fn)


def _random_bits(ids: Tensor, width: int, key: int) -> Tensor:
    """32 bits for every number of these rows, as int32."""
    row = _mix(_mix(_low(ids) ^ signed(key)) + _low(ids >> 32))
    column = torch.arange(width, device=ids.device, dtype=torch.int64) * _GOLDEN
    return _mix(row[:, None] + _low(column))


def _low(x: Tensor) -> Tensor:
    """The low 32 bits of int64."""
    return x.to(torch.int32)


def _mix(x: Tensor) -> Tensor:
    """lowbias32 on int32, whose products wrap around."""
    first, second = map(signed, _MULTIPLIERS)
    x = (x ^ ((x >> 16) & 0xFFFF)) * first
    x = (x ^ ((x >> 15) & 0x1FFFF)) * second
    return x ^ ((x >> 16) & 0xFFFF)


def _scrambled(x: int) -> int:
    """lowbias32 on a Python number of 32 bits."""
    first, second = _MULTIPLIERS
    x = ((x ^ (x >> 16)) * first) & _BITS
    x = ((x ^ (x >> 15)) * second) & _BITS
    return x ^ (x >> 16)


def signed(x: int) -> int:
    """32 bits as torch's int32 has them."""
    return x - (1 << 32) if x >> 31 else x

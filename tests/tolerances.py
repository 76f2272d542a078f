"""How closely results must agree, for `torch.testing.assert_close(a, b, **FLOAT64)`: the only place that says so."""

from typing import TypedDict


class Tolerance(TypedDict):
    rtol: float
    atol: float


# same mathematics in another order of operations
FLOAT64 = Tolerance(rtol=1e-9, atol=1e-11)
FLOAT32 = Tolerance(rtol=1e-4, atol=1e-5)
# a few operations on numbers near 1 that round in another way
FLOAT32_LAST_BITS = Tolerance(rtol=2e-6, atol=5e-7)
# bfloat16 against float64, relative to the norm of the whole tensor: 8 bits of mantissa, a few dozen summands
BFLOAT16_NORM = 2e-2
# the same for float32 products that are not rounded to TF32, and for float16 with 11 bits
FLOAT32_NORM = 1e-5
FLOAT16_NORM = 4e-3

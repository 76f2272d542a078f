"""AdamW on rows of a table as one Triton kernel: every row is read and written once, its gradient summed on the way."""

from typing import TYPE_CHECKING, no_type_check

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from moestro.ops.quantized import LARGEST, QuantizedTable
from moestro.ops.rounding import rounding_key, signed
from moestro.ops.row_gradients import RowGradient, RowValues
from moestro.ops.triton_ffn_plan import launch
from moestro.ops.triton_peer import bits
from moestro.ops.triton_peer_rows import _widened, sizes

if TYPE_CHECKING:
    from moestro.ops.row_adamw import RowFactors, RowStep

_GOLDEN = tl.constexpr(0x9E3779B9)


def adamw_rows(
    table: Tensor | QuantizedTable,
    moments: tuple[Tensor, Tensor],
    gradient: RowGradient,
    factors: "RowFactors",
    step: "RowStep",
) -> None:
    """As `ops.row_adamw` by plain operations, for a table and its first moment in float32 or both in bfloat16, or a
    table in 8 bits and its first moment in bfloat16, the second in float32; what is in bfloat16 or float8 travels as
    its bits. A row of many places is one program's, place after place."""
    (mean, square), n = moments, len(gradient.ids)
    d = mean.shape[1]
    if not n or not d:
        return
    if isinstance(table, QuantizedTable):
        numbers, scale, largest = bits(table.codes), table.scale, LARGEST[table.codes.dtype]
    else:
        numbers, scale, largest = table, square, 0.0
    kept = [v.view(torch.int16) if v.dtype == torch.bfloat16 else v for v in (numbers, mean)]
    if isinstance(gradient, RowValues):
        none = gradient.ids
        given = gradient.all.contiguous(), none, none, none, none
    else:
        places = gradient.order.contiguous(), gradient.starts.contiguous(), gradient.token.contiguous()
        given = gradient.source, *places, gradient.coefficient.contiguous()
    idle = [factors.decay if v is None else v for v in (factors.mean, factors.square)]
    keys = [signed(rounding_key(step.key, number)) for number in range(2)]
    size, (beta1, beta2) = sizes(d), step.betas
    launch(
        _adamw_kernel, n, *kept, square, scale, gradient.ids, *given, factors.decay, factors.size, factors.correction,
        *idle, 1 - beta1, beta2, 1 - beta2, step.eps, *keys, d, LARGEST=largest,
        FACTORED=not isinstance(gradient, RowValues), WAIT=factors.mean is None, SLOW=1 - beta1 < 0.5, BD=size.columns,
        num_warps=size.warps,
    )  # fmt: skip


@triton.jit(do_not_specialize=["table_key", "mean_key"])
@no_type_check
def _adamw_kernel(table, mean, square, scale, ids, source, order, starts, token, coefficient, decay, step_size,
                  correction, idle_mean, idle_square, rate, beta2, rate2, eps, table_key, mean_key, d: tl.constexpr,
                  LARGEST: tl.constexpr, FACTORED: tl.constexpr, WAIT: tl.constexpr, SLOW: tl.constexpr,
                  BD: tl.constexpr):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    row, c = tl.load(ids + r), tl.arange(0, BD)
    at, here = row * d + c, c < d
    if FACTORED:
        slope = tl.zeros((BD,), tl.float32)
        for j in range(tl.load(starts + r), tl.load(starts + r + 1)):
            w = tl.load(coefficient + tl.load(order + j)).to(tl.float32)
            slope += w * tl.load(source + tl.load(token + j) * d + c, mask=here, other=0.0).to(tl.float32)
    else:
        slope = tl.load(source + r * d + c, mask=here, other=0.0).to(tl.float32)
    weight, m = _widened(table + at, here), _widened(mean + at, here)
    if LARGEST > 0:
        weight = weight * tl.load(scale + row)
    v = tl.load(square + at, mask=here, other=0.0)
    if not WAIT:
        m = m * tl.load(idle_mean + r)
        v = v * tl.load(idle_square + r)
    # as torch has lerp: exact at both ends
    m = m + rate * (slope - m) if SLOW else slope - (slope - m) * (1 - rate)
    v = v * beta2 + rate2 * slope * slope
    bottom = tl.div_rn(tl.sqrt_rn(v), tl.zeros((BD,), tl.float32) + tl.load(correction + r)) + eps
    weight = weight * tl.load(decay + r) + tl.div_rn(tl.load(step_size + r) * m, bottom)
    if LARGEST > 0:
        fitting = _fitting(tl.where(here, weight, 0.0), tl.load(scale + row), LARGEST)
        tl.store(scale + row, fitting)
        weight = tl.div_rn(weight, tl.zeros((BD,), tl.float32) + fitting)
        weight = tl.where(weight > LARGEST, LARGEST, tl.where(weight < -LARGEST, -LARGEST, weight))
    _store(table + at, weight, here, _random_bits(row, c, table_key))
    _store(mean + at, m, here, _random_bits(row, c, mean_key))
    tl.store(square + at, v, mask=here)


@triton.jit
@no_type_check
def _fitting(x, scale, LARGEST: tl.constexpr):
    """The scale with which `QuantizedTable.replace_rows` writes this row."""
    size = tl.abs(x)
    most = tl.max(size, axis=0)
    keeps = ((most <= LARGEST * scale) & (most > LARGEST / 4 * scale)) | (most == 0)
    # the power of two above most / LARGEST, at least 2^-126
    exponent = tl.div_rn(most, LARGEST).to(tl.int32, bitcast=True) >> 23
    power = ((exponent + 1) << 23).to(tl.float32, bitcast=True)
    broken = tl.max(tl.where(size < float("inf"), 0, 1), axis=0) > 0
    return tl.where(broken, float("nan"), tl.where(keeps, scale, power))


@triton.jit
@no_type_check
def _store(pointers, x, here, noise):
    """`ops.rounding.stochastic_bfloat16`, `stochastic_int8` and `stochastic_float8`, by the same bits."""
    if pointers.dtype.element_ty == tl.int16:
        bits = (x.to(tl.uint32, bitcast=True) + (noise & 0xFFFF)) >> 16
        x = tl.where(x != x, 0x7FC0, bits).to(tl.uint16).to(tl.int16, bitcast=True)
    elif pointers.dtype.element_ty == tl.int8:
        x = tl.where(x != x, 0.0, tl.floor(x + _fraction(noise))).to(tl.int8)
    elif pointers.dtype.element_ty == tl.uint8:
        size = tl.abs(x)
        # above 2^-6 the exponent's bias is 7 in place of 127; below, numbers are 2^-9 apart
        normal = ((size.to(tl.int32, bitcast=True) + (noise & 0xFFFFF).to(tl.int32)) >> 20) - 960
        small = tl.where(size < 0.015625, size, 0.0)
        code = tl.where(size < 0.015625, tl.floor(small * 512 + _fraction(noise)).to(tl.int32), normal)
        code = tl.where(x != x, 0x7F, code)
        x = (code | ((x.to(tl.uint32, bitcast=True) >> 31) << 7).to(tl.int32)).to(tl.uint8)
    tl.store(pointers, x, mask=here)


@triton.jit
@no_type_check
def _fraction(noise):
    return (noise & 0xFFFF).to(tl.float32) * 0.0000152587890625


@triton.jit
@no_type_check
def _random_bits(row, c, key):
    """`ops.rounding._random_bits`."""
    hashed = _mix(_mix(row.to(tl.uint32) ^ key.to(tl.uint32)) + (row >> 32).to(tl.uint32))
    return _mix(hashed + c.to(tl.uint32) * _GOLDEN)


@triton.jit
@no_type_check
def _mix(x):
    """lowbias32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)

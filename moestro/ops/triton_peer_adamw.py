"""AdamW on rows of a table as one Triton kernel: every row is read and written once, its gradient summed on the way."""

from typing import TYPE_CHECKING, no_type_check

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from moestro.ops.rounding import rounding_key, signed
from moestro.ops.row_gradients import RowGradient, RowValues
from moestro.ops.triton_ffn_plan import launch
from moestro.ops.triton_peer_rows import sizes

if TYPE_CHECKING:
    from moestro.ops.row_adamw import RowFactors, RowStep

_GOLDEN = tl.constexpr(0x9E3779B9)


def adamw_rows(
    table: Tensor, moments: tuple[Tensor, Tensor], gradient: RowGradient, factors: "RowFactors", step: "RowStep"
) -> None:
    """As `ops.row_adamw` by plain operations, for a table and its first moment in float32 or both in bfloat16, the
    second in float32; what is in bfloat16 travels as its bits. A row of many places is one program's, place after
    place."""
    n, (_, d) = len(gradient.ids), table.shape
    if not n or not d:
        return
    mean, square = moments
    narrow = table.dtype == torch.bfloat16
    kept = [v.view(torch.int16) if narrow else v for v in (table, mean)]
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
        _adamw_kernel, n, *kept, square, gradient.ids, *given, factors.decay, factors.size, factors.correction, *idle,
        1 - beta1, beta2, 1 - beta2, step.eps, *keys, d, NARROW=narrow, FACTORED=not isinstance(gradient, RowValues),
        WAIT=factors.mean is None, SLOW=1 - beta1 < 0.5, BD=size.columns, num_warps=size.warps,
    )  # fmt: skip


@triton.jit(do_not_specialize=["table_key", "mean_key"])
@no_type_check
def _adamw_kernel(table, mean, square, ids, source, order, starts, token, coefficient, decay, step_size, correction,
                  idle_mean, idle_square, rate, beta2, rate2, eps, table_key, mean_key, d: tl.constexpr,
                  NARROW: tl.constexpr, FACTORED: tl.constexpr, WAIT: tl.constexpr, SLOW: tl.constexpr,
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
    weight, m = _widened(table + at, here, NARROW), _widened(mean + at, here, NARROW)
    v = tl.load(square + at, mask=here, other=0.0)
    if not WAIT:
        m = m * tl.load(idle_mean + r)
        v = v * tl.load(idle_square + r)
    # as torch has lerp: exact at both ends
    m = m + rate * (slope - m) if SLOW else slope - (slope - m) * (1 - rate)
    v = v * beta2 + rate2 * slope * slope
    bottom = tl.div_rn(tl.sqrt_rn(v), tl.zeros((BD,), tl.float32) + tl.load(correction + r)) + eps
    weight = weight * tl.load(decay + r) + tl.div_rn(tl.load(step_size + r) * m, bottom)
    _store(table + at, weight, here, row, c, table_key, NARROW)
    _store(mean + at, m, here, row, c, mean_key, NARROW)
    tl.store(square + at, v, mask=here)


@triton.jit
@no_type_check
def _widened(pointers, here, NARROW: tl.constexpr):
    x = tl.load(pointers, mask=here, other=0)
    if NARROW:
        x = (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x


@triton.jit
@no_type_check
def _store(pointers, x, here, row, c, key, NARROW: tl.constexpr):
    """`ops.rounding.stochastic_bfloat16`, by the same bits."""
    if NARROW:
        hashed = _mix(_mix(row.to(tl.uint32) ^ key.to(tl.uint32)) + (row >> 32).to(tl.uint32))
        noise = _mix(hashed + c.to(tl.uint32) * _GOLDEN) & 0xFFFF
        bits = (x.to(tl.uint32, bitcast=True) + noise) >> 16
        x = tl.where(x != x, 0x7FC0, bits).to(tl.uint16).to(tl.int16, bitcast=True)
    tl.store(pointers, x, mask=here)


@triton.jit
@no_type_check
def _mix(x):
    """lowbias32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)

"""Triton kernels that fetch rows of tables by id: experts of one neuron and plain values, forward and backward.

One program for a token, or for a part of a row's gradient; one-dimensional grids and int64 offsets, so that neither a
million experts nor tables of more than 2^31 numbers are too many. Sums are in float32, always in the same order.
Tables may be codes in 8 bits with a scale for each row: those of float8 (e4m3fn) travel as their bits, which every GPU
can widen.
"""

from typing import NamedTuple, no_type_check

import torch
import torch.nn.functional as F
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from moestro.ops.triton_ffn_backward import _act_gradient
from moestro.ops.triton_ffn_forward import _act
from moestro.ops.triton_ffn_plan import interpreted, launch, power_of_two

# What a row is: a plain value, a neuron (a row of `up` and one of `down`), a gated one (a row of `gate`, too).
VALUES, NEURONS, GATED = 0, 1, 2
# Numbers of gathered rows that a program holds at a time.
_HELD = 8192
# Places of a row that one program sums.
_PART = 256


class Sizes(NamedTuple):
    """Rows fetched at a time, columns (all of them), and the warps that a program has."""

    rows: int
    columns: int
    warps: int

    def options(self) -> dict[str, int]:
        """How kernels are launched."""
        return {"BR": self.rows, "BD": self.columns, "num_warps": self.warps}


def sizes(d: int) -> Sizes:
    """Sizes by rule for rows of d numbers: a program has them whole, in registers."""
    columns = max(16, power_of_two(d))
    if interpreted():
        return Sizes(4, columns, 4)
    return Sizes(max(1, min(8, _HELD // columns)), columns, 4 if columns <= 1024 else 8)


class Hidden(NamedTuple):
    """Products of x with the rows of `gate` or, without it, of `up`, and with it those of `up`; float32 [t, k]."""

    z: Tensor
    linear: Tensor


def forward(
    x: Tensor,
    ids: Tensor,
    weight: Tensor,
    tables: tuple[Tensor, ...],
    activation: str,
    scales: tuple[Tensor, ...] = (),
) -> tuple[Tensor, Hidden]:
    """y_t = sum_k weight_tk * hidden_tk * down[ids_tk] in the dtype of `x`; tables are (down,), (up, down) or (gate,
    up, down), each with the scales of its rows where they are codes, and x of the first kind is a tensor of the
    output's shape that is not read."""
    (t, k), d = ids.shape, tables[-1].shape[1]
    mode, y, z, linear = len(tables) - 1, x.new_empty(t, d), *_hidden(ids, len(tables) - 1)
    if y.numel():
        launch(
            _forward_kernel, t, x, ids, weight, *_three(tables), *_three(scales or tables), y, z, linear, d, k,
            MODE=mode, ACT=activation, SCALED=bool(scales), **sizes(d).options(),
        )  # fmt: skip
    return y, Hidden(z, linear)


def _three(each: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """What belongs to `gate`, `up` and `down`; where there is no such table, to another, and it is not read."""
    return each[0], each[-min(2, len(each))], each[-1]


def _hidden(ids: Tensor, mode: int) -> tuple[Tensor, Tensor]:
    """Memory for what a mode keeps of every row; the first number of the ids' where it keeps nothing."""
    return tuple(ids.new_empty(ids.shape if mode > i else (1, 1), dtype=torch.float32) for i in range(2))  # type: ignore


class Slopes(NamedTuple):
    """Gradients of x and of the gates, and what the rows' gradients are made of, [t, k] each: `z` and `linear` multiply
    x in those of gate (or up) and up, `coefficient` dy in that of down. Modes that lack one have [1, 1]."""

    x: Tensor
    weight: Tensor
    z: Tensor
    linear: Tensor
    coefficient: Tensor


def backward(
    dy: Tensor,
    ids: Tensor,
    weight: Tensor,
    tables: tuple[Tensor, ...],
    hidden: Hidden,
    activation: str,
    scales: tuple[Tensor, ...] = (),
) -> Slopes:
    """Of `forward`, rows fetched once more."""
    (t, k), d, mode = ids.shape, tables[-1].shape[1], len(tables) - 1
    dx = dy.new_empty((t, d) if mode else (1, 1))
    dweight = torch.empty_like(weight)
    dz, dlinear = _hidden(ids, mode)
    coefficient, _ = _hidden(ids, mode)
    if ids.numel() and d:
        launch(
            _backward_kernel, t, dy, ids, weight, *_three(tables), *_three(scales or tables), *hidden, dx, dweight, dz,
            dlinear, coefficient, d, k, MODE=mode, ACT=activation, SCALED=bool(scales), **sizes(d).options(),
        )  # fmt: skip
    elif mode:
        dx.zero_()
    return Slopes(dx, dweight, dz, dlinear, coefficient)


@triton.jit
@no_type_check
def _forward_kernel(x, ids, weight, gate, up, down, gate_scale, up_scale, down_scale, y, z, linear, d: tl.constexpr, k,
                    MODE: tl.constexpr, ACT: tl.constexpr, SCALED: tl.constexpr, BR: tl.constexpr,
                    BD: tl.constexpr):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BD)
    if MODE > 0:
        x_row = tl.load(x + t * d + c, mask=c < d, other=0.0).to(tl.float32)
    total = tl.zeros((BD,), tl.float32)
    for first in range(0, k, BR):
        j = first + tl.arange(0, BR)
        place = t * k + j
        row = tl.load(ids + place, mask=j < k, other=0).to(tl.int64)
        at = row[:, None] * d + c[None, :]
        there = (j < k)[:, None] & (c < d)[None, :]
        h = tl.load(weight + place, mask=j < k, other=0.0).to(tl.float32)
        if MODE > 0:
            a = _scaled(tl.sum(_widened(up + at, there) * x_row[None, :], axis=1), up_scale + row, j < k, SCALED)
            if MODE == 2:
                tl.store(linear + place, a, mask=j < k)
                h = h * a
                a = _scaled(
                    tl.sum(_widened(gate + at, there) * x_row[None, :], axis=1), gate_scale + row, j < k, SCALED
                )
            tl.store(z + place, a, mask=j < k)
            h = h * _act(a, ACT)
        h = _scaled(h, down_scale + row, j < k, SCALED)
        total += tl.sum(_widened(down + at, there) * h[:, None], axis=0)
    tl.store(y + t * d + c, total.to(y.dtype.element_ty), mask=c < d)


@triton.jit
@no_type_check
def _backward_kernel(dy, ids, weight, gate, up, down, gate_scale, up_scale, down_scale, z, linear, dx, dweight, dz,
                     dlinear, coefficient, d: tl.constexpr, k, MODE: tl.constexpr, ACT: tl.constexpr,
                     SCALED: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BD)
    dy_row = tl.load(dy + t * d + c, mask=c < d, other=0.0).to(tl.float32)
    total = tl.zeros((BD,), tl.float32)
    for first in range(0, k, BR):
        j = first + tl.arange(0, BR)
        place = t * k + j
        row = tl.load(ids + place, mask=j < k, other=0).to(tl.int64)
        at = row[:, None] * d + c[None, :]
        there = (j < k)[:, None] & (c < d)[None, :]
        along = _scaled(tl.sum(_widened(down + at, there) * dy_row[None, :], axis=1), down_scale + row, j < k, SCALED)
        if MODE == 0:
            tl.store(dweight + place, along.to(dweight.dtype.element_ty), mask=j < k)
        else:
            w = tl.load(weight + place, mask=j < k, other=0.0).to(tl.float32)
            a = tl.load(z + place, mask=j < k, other=0.0)
            hidden = _act(a, ACT)
            slope = along * w * _act_gradient(a, ACT)
            if MODE == 2:
                b = tl.load(linear + place, mask=j < k, other=0.0)
                straight = along * w * hidden
                tl.store(dlinear + place, straight, mask=j < k)
                straight = _scaled(straight, up_scale + row, j < k, SCALED)
                total += tl.sum(_widened(up + at, there) * straight[:, None], axis=0)
                slope = slope * b
                hidden = hidden * b
            tl.store(dz + place, slope, mask=j < k)
            tl.store(coefficient + place, hidden * w, mask=j < k)
            tl.store(dweight + place, (along * hidden).to(dweight.dtype.element_ty), mask=j < k)
            slope = _scaled(slope, gate_scale + row, j < k, SCALED)
            total += tl.sum(_widened(gate + at, there) * slope[:, None], axis=0)
    if MODE > 0:
        tl.store(dx + t * d + c, total.to(dx.dtype.element_ty), mask=c < d)


@triton.jit
@no_type_check
def _widened(pointers, there):
    """Numbers of a table in float32; int16 are the bits of bfloat16, uint8 those of float8 (e4m3fn)."""
    x = tl.load(pointers, mask=there, other=0)
    if pointers.dtype.element_ty == tl.int16:
        x = (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif pointers.dtype.element_ty == tl.uint8:
        size = x.to(tl.int32) & 0x7F
        # the exponent's bias is 127 in place of 7; below 8 there is none, and numbers are 2^-9 apart
        number = tl.where(
            size < 8, size.to(tl.float32) * 0.001953125, ((size + 960) << 20).to(tl.float32, bitcast=True)
        )
        number = tl.where(size == 0x7F, float("nan"), number)
        x = tl.where(x > 0x7F, -number, number)
    return x.to(tl.float32)


@triton.jit
@no_type_check
def _scaled(x, scale, there, SCALED: tl.constexpr):
    """Times the scales of the rows that are there, where rows are codes; else 0."""
    if SCALED:
        x = x * tl.load(scale, mask=there, other=0.0)
    return x


def segment_sums(order: Tensor, starts: Tensor, source: Tensor, token: Tensor, coefficient: Tensor) -> Tensor:
    """out_s = sum over the places j from starts_s up to the next of coefficient[order_j] * source[token_j], [segments,
    d]; every row is written once, those without a place as zeros. Segments of many places are summed in parts, whose
    sums are added in a second pass. Nothing waits for the device."""
    n, d, places = len(starts), source.shape[1], len(order)
    out = source.new_empty(n, d)
    if not out.numel():
        return out
    ends = F.pad(starts, (0, 1), value=places)[1:]
    parts = ((ends - starts + _PART - 1) // _PART).clamp(min=1)
    after = parts.cumsum(0)
    several = torch.where(parts > 1, parts, 0)
    slot = several.cumsum(0) - several
    bound, size = n + places // _PART, sizes(d)
    segment = torch.searchsorted(after, torch.arange(bound, device=after.device), right=True)
    partial = source.new_empty(2 * (places // _PART) + 1, d, dtype=torch.float32)
    launch(
        _parts_kernel, bound, order, starts, ends, source, token, coefficient, segment, after, parts, slot, partial,
        out, n, d, PART=_PART, **size.options(),
    )  # fmt: skip
    if places > _PART:
        busiest = parts.topk(min(n, places // _PART), sorted=False).indices
        launch(_whole_kernel, len(busiest), busiest, parts, slot, partial, out, d, **size.options())
    return out


@triton.jit
@no_type_check
def _parts_kernel(order, starts, ends, source, token, coefficient, segment, after, parts, slot, partial, out,
                  n, d: tl.constexpr, PART: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    p = tl.program_id(0).to(tl.int64)
    s = tl.load(segment + p)
    if s < n:
        count = tl.load(parts + s)
        number = p - (tl.load(after + s) - count)
        first = tl.load(starts + s) + number * PART
        last = tl.minimum(first + PART, tl.load(ends + s))
        c = tl.arange(0, BD)
        total = tl.zeros((BD,), tl.float32)
        for step in range(0, (last - first).to(tl.int32), BR):
            j = first + step + tl.arange(0, BR)
            row = tl.load(token + j, mask=j < last, other=0).to(tl.int64)
            w = tl.load(coefficient + tl.load(order + j, mask=j < last, other=0), mask=j < last, other=0.0)
            there = (j < last)[:, None] & (c < d)[None, :]
            x = tl.load(source + row[:, None] * d + c[None, :], mask=there, other=0.0).to(tl.float32)
            total += tl.sum(x * w.to(tl.float32)[:, None], axis=0)
        if count > 1:
            tl.store(partial + (tl.load(slot + s) + number) * d + c, total, mask=c < d)
        else:
            tl.store(out + s * d + c, total.to(out.dtype.element_ty), mask=c < d)


@triton.jit
@no_type_check
def _whole_kernel(busiest, parts, slot, partial, out, d: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr):
    s = tl.load(busiest + tl.program_id(0))
    count = tl.load(parts + s)
    c = tl.arange(0, BD)
    if count > 1:
        first = partial + tl.load(slot + s) * d + c
        total = tl.zeros((BD,), tl.float32)
        for part in range(0, count):
            total += tl.load(first + part * d, mask=c < d, other=0.0)
        tl.store(out + s * d + c, total.to(out.dtype.element_ty), mask=c < d)

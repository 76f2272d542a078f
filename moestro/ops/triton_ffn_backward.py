"""Triton kernels of the backward pass: gradients of gates and pre-activations (B1) and of the weights (B2, B4).

The gradient of the rows (B3) and its sum over a token's rows (B5) are `down` and `combine` of the forward pass.
"""

from typing import no_type_check

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from moestro.ops.triton_ffn_forward import _act, precision
from moestro.ops.triton_ffn_plan import (
    _GROUP,
    _PARTS,
    _UP,
    _WEIGHT,
    _WEIGHT_ORDER,
    Blocks,
    _expert,
    _owner,
    _padded,
    _parts,
    _place,
    launch,
    programs,
    search_steps,
)


def hidden_gradients(
    dy: Tensor, token: Tensor, weight: Tensor, w_out: Tensor, plan: Tensor, z: Tensor, dz: Tensor, scaled: Tensor,
    partial: Tensor, activation: str, gates: int, blocks: Blocks,
) -> None:  # fmt: skip
    """B1: with g = dy_token[n] W_out,e^T, writes dz_n, scaled_n = weight_n * hidden_n and, for every tile of units,
    that tile's part of dweight_n = <g, hidden_n> to `partial` (n, tiles), whose other elements stay as they are."""
    n_experts = plan.shape[1] - 1
    launch(
        _hidden_gradients_kernel, programs(dy.device), dy, token, weight, w_out, plan, z, dz, scaled, partial,
        dy.shape[1], n_experts, partial.shape[1],
        GATES=gates, ACT=activation, PRECISION=precision(), BM=blocks.rows, BU=blocks.units, BK=blocks.inner,
        GROUP=_GROUP, STEPS=search_steps(n_experts), **blocks.row_options(),
    )  # fmt: skip


def weight_gradients(
    left: Tensor, source: Tensor, token: Tensor, plan: Tensor, out: Tensor, gates: int, blocks: Blocks,
    split: int, work: Tensor | None,
) -> None:  # fmt: skip
    """Sum over an expert's rows n of left_n^T source_token[n]: B2 with (weight * hidden, dy), B4 with (dz, x).

    Experts without rows get zeros. Experts with more than `split` rows are summed in parts to `work` (float32, room as
    `part_units` says), which a second pass adds up, always in the same order; without `work` nothing is split.
    """
    n_experts, d = plan.shape[1] - 1, out.shape[1]
    split = 0 if work is None else split
    launch(
        _weight_gradients_kernel, programs(out.device), left, source, token, plan, out, out if work is None else work,
        d, n_experts, split,
        GATES=gates, PRECISION=precision(), BU=blocks.units, BD=blocks.model, BK=blocks.inner, GROUP=_GROUP,
        SPLITS=work is not None, STEPS=search_steps(n_experts), **blocks.weight_options(),
    )  # fmt: skip
    if work is not None:
        launch(
            _sum_parts_kernel, programs(out.device), work, plan, out, d, n_experts, split,
            GATES=gates, BU=blocks.units, BD=blocks.model,
        )  # fmt: skip


def part_units(n_rows: int, widest: int, split: int) -> int:
    """Units of all partial weight gradients, at most: an expert with more than `split` rows has one part for each that
    is full, and one more."""
    return 2 * (n_rows // split) * widest if split else 0


@triton.jit
@no_type_check
def _act_gradient(z, ACT: tl.constexpr):
    """Derivative of `_act` at z, in fp32."""
    if ACT == "silu":
        s = tl.sigmoid(z)
        dy = s * (1 + z * (1 - s))
    elif ACT == "gelu":
        normal = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        dy = 0.5 * (1 + tl.erf(z * 0.7071067811865476)) + z * normal
    elif ACT == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        dy = s + z * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * z * z)
    elif ACT == "relu":
        dy = tl.where(z <= 0, 0.0, 1.0)
    else:
        dy = tl.full(z.shape, 1.0, tl.float32)
    return dy


@triton.jit
@no_type_check
def _hidden_gradients_kernel(dy, token, weight, w_out, plan, z, dz, scaled, partial, d: tl.constexpr, n_experts,
                             n_partial, GATES: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr,
                             BM: tl.constexpr, BU: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
                             STEPS: tl.constexpr):  # fmt: skip
    prefix = plan + _UP * (n_experts + 1)
    for tile in range(tl.program_id(0), tl.load(prefix + n_experts).to(tl.int32), tl.num_programs(0)):
        e = _owner(prefix, n_experts, tile, STEPS)
        row, n, unit, w, start = _expert(plan, n_experts + 1, e)
        local = tile - tl.load(prefix + e).to(tl.int32)
        i, j = _place(local, tl.cdiv(n, BM), tl.cdiv(w, BU), GROUP)
        r = i * BM + tl.arange(0, BM)
        u = j * BU + tl.arange(0, BU)
        dy_row = dy + tl.load(token + row + r, mask=r < n, other=0).to(tl.int64) * d
        g = tl.zeros((BM, BU), tl.float32)
        for k in range(0, d, BK):
            c = k + tl.arange(0, BK)
            a = tl.load(dy_row[:, None] + c[None, :], mask=(r < n)[:, None] & (c < d)[None, :], other=0.0)
            b_ok = (c < d)[:, None] & (u < w)[None, :]
            b = tl.load(w_out + ((unit + u) * d)[None, :] + c[:, None], mask=b_ok, other=0.0)
            g = tl.dot(a, b, g, input_precision=PRECISION)
        gate = tl.load(weight + row + r, mask=r < n, other=0.0).to(tl.float32)
        # one half of the columns after the other: the whole tile does not fit into registers
        left, right = tl.split(tl.permute(tl.reshape(g, (BM, 2, BU // 2)), (0, 2, 1)))
        first = start + (i * BM).to(tl.int64) * _padded(w)
        part = _through_hidden(left, gate, z, dz, scaled, first, j * BU, n - i * BM, w, GATES, ACT)
        part += _through_hidden(right, gate, z, dz, scaled, first, j * BU + BU // 2, n - i * BM, w, GATES, ACT)
        tl.store(partial + (row + r) * n_partial + j, part, mask=r < n)


@triton.jit
@no_type_check
def _through_hidden(g, gate, z, dz, scaled, first, column, n, w, GATES: tl.constexpr, ACT: tl.constexpr):
    """Backward through act(gate) * up on a tile whose first row lies at hidden element `first`, from `column` on:
    stores dz and gate * hidden, returns the rows' sums of g * hidden."""
    r = tl.arange(0, g.shape[0])
    u = column + tl.arange(0, g.shape[1])
    w8 = _padded(w)
    keep = (r < n)[:, None] & (u < w8)[None, :]
    # beyond w lie zeros; offsets within the tile fit int32
    g = tl.where((u < w)[None, :], g, 0.0)
    z_at = (r * (w8 * GATES))[:, None] + u[None, :]
    z += first * GATES
    dz += first * GATES
    z_gate = tl.load(z + z_at, mask=keep, other=0.0).to(tl.float32)
    hidden = _act(z_gate, ACT)
    slope = _act_gradient(z_gate, ACT)
    scaled_g = g * gate[:, None]
    if GATES == 2:
        tl.store(dz + w8 + z_at, (scaled_g * hidden).to(dz.dtype.element_ty), mask=keep)
        z_up = tl.load(z + w8 + z_at, mask=keep, other=0.0).to(tl.float32)
        slope = slope * z_up
        hidden = hidden * z_up
    tl.store(dz + z_at, (scaled_g * slope).to(dz.dtype.element_ty), mask=keep)
    at = scaled + first + (r * w8)[:, None] + u[None, :]
    tl.store(at, (hidden * gate[:, None]).to(scaled.dtype.element_ty), mask=keep)
    return tl.sum(g * hidden, axis=1)


@triton.jit
@no_type_check
def _weight_gradients_kernel(left, source, token, plan, out, work, d: tl.constexpr, n_experts, split,
                             GATES: tl.constexpr, PRECISION: tl.constexpr, BU: tl.constexpr, BD: tl.constexpr,
                             BK: tl.constexpr, GROUP: tl.constexpr, SPLITS: tl.constexpr,
                             STEPS: tl.constexpr):  # fmt: skip
    stride = n_experts + 1
    prefix = plan + _WEIGHT * stride
    for tile in range(tl.program_id(0), tl.load(prefix + n_experts).to(tl.int32), tl.num_programs(0)):
        slot = _owner(prefix, n_experts, tile, STEPS)
        e = tl.load(plan + _WEIGHT_ORDER * stride + slot)
        row, n, unit, w, start = _expert(plan, stride, e)
        local = tile - tl.load(prefix + slot).to(tl.int32)
        first = 0
        last = n
        if SPLITS:
            parts = _parts(n, split)
            part = local % parts
            local = local // parts
            first = part * split
            last = tl.where(parts > 1, tl.minimum(n, first + split), n)
        i, j = _place(local, tl.cdiv(w, BU), tl.cdiv(d, BD), GROUP)
        u = i * BU + tl.arange(0, BU)
        c = j * BD + tl.arange(0, BD)
        w8 = _padded(w)
        gate = tl.zeros((BU, BD), tl.float32)
        value = tl.zeros((BU, BD), tl.float32)
        for k in range(first, last, BK):
            r = k + tl.arange(0, BK)
            t = tl.load(token + row + r, mask=r < last, other=0).to(tl.int64)
            b_ok = (r < last)[:, None] & (c < d)[None, :]
            b = tl.load(source + (t * d)[:, None] + c[None, :], mask=b_ok, other=0.0)
            a_at = left + ((start + r.to(tl.int64) * w8) * GATES)[None, :] + u[:, None]
            a_ok = (u < w8)[:, None] & (r < last)[None, :]
            gate = tl.dot(tl.load(a_at, mask=a_ok, other=0.0), b, gate, input_precision=PRECISION)
            if GATES == 2:
                value = tl.dot(tl.load(a_at + w8, mask=a_ok, other=0.0), b, value, input_precision=PRECISION)
        whole = w
        if SPLITS:
            # zero rows instead of `& (parts > 1)`: triton 3.9's interpreter takes no mask made with a lone comparison
            in_parts = tl.where(parts > 1, w, 0)
            whole = w - in_parts
            before = tl.load(plan + _PARTS * stride + e) + part.to(tl.int64) * w
            at = work + ((before * GATES + u) * d)[:, None] + c[None, :]
            _store_gradients(at, gate, value, w, d, (u < in_parts)[:, None] & (c < d)[None, :], GATES)
        at = out + ((unit * GATES + u) * d)[:, None] + c[None, :]
        _store_gradients(at, gate, value, w, d, (u < whole)[:, None] & (c < d)[None, :], GATES)


@triton.jit
@no_type_check
def _store_gradients(at, gate, value, w, d: tl.constexpr, ok, GATES: tl.constexpr):
    """Store a tile of an expert's gate rows at `at`, and that of its up rows w rows further on."""
    tl.store(at, gate.to(at.dtype.element_ty), mask=ok)
    if GATES == 2:
        tl.store(at + w.to(tl.int64) * d, value.to(at.dtype.element_ty), mask=ok)


@triton.jit
@no_type_check
def _sum_parts_kernel(work, plan, out, d: tl.constexpr, n_experts, split, GATES: tl.constexpr, BU: tl.constexpr,
                      BD: tl.constexpr):  # fmt: skip
    columns = tl.cdiv(d, BD)
    for e in range(0, n_experts):
        row, n, unit, w, start = _expert(plan, n_experts + 1, e)
        parts = _parts(n, split)
        if parts > 1:
            size = w.to(tl.int64) * GATES
            before = tl.load(plan + _PARTS * (n_experts + 1) + e) * GATES
            for tile in range(tl.program_id(0), tl.cdiv(w * GATES, BU) * columns, tl.num_programs(0)):
                u = tile // columns * BU + tl.arange(0, BU)
                c = tile % columns * BD + tl.arange(0, BD)
                ok = (u < size)[:, None] & (c < d)[None, :]
                total = tl.zeros((BU, BD), tl.float32)
                for part in range(0, parts):
                    total += tl.load(work + ((before + part * size + u) * d)[:, None] + c[None, :], mask=ok, other=0.0)
                at = out + ((unit * GATES + u) * d)[:, None] + c[None, :]
                tl.store(at, total.to(out.dtype.element_ty), mask=ok)

"""Triton kernels of the forward pass: up projection with activation, down projection, sum over a token's rows.

Hidden rows are compact: those of an expert of width w have a stride of w rounded up to 8 (twice that for a gated
pre-activation: gate, then up), and the elements beyond w are zeros. All offsets into data are int64.
"""

from typing import no_type_check

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from moestro.ops.triton_ffn_plan import (
    _DOWN,
    _DOWN_ORDER,
    _GROUP,
    _UP,
    Blocks,
    _expert,
    _owner,
    _padded,
    _place,
    launch,
    power_of_two,
    programs,
    search_steps,
)


def up(
    x: Tensor, token: Tensor, w_in: Tensor, plan: Tensor, z: Tensor | None, hidden: Tensor | None,
    activation: str, gates: int, blocks: Blocks,
) -> None:  # fmt: skip
    """F1: pre-activations z_n = W_in,e x_token[n] and hidden_n = act(gate) * up; writes those of the two given."""
    n_experts = plan.shape[1] - 1
    launch(
        _up_kernel, programs(x.device), x, token, w_in, plan, x if z is None else z, x if hidden is None else hidden,
        x.shape[1], n_experts,
        GATES=gates, ACT=activation, SAVE_Z=z is not None, SAVE_HIDDEN=hidden is not None, PRECISION=precision(),
        BM=blocks.rows, BU=blocks.units, BK=blocks.inner, GROUP=_GROUP, STEPS=search_steps(n_experts),
        **blocks.row_options(),
    )  # fmt: skip


def down(left: Tensor, weights: Tensor, plan: Tensor, out: Tensor, gates: int, blocks: Blocks) -> None:
    """F2: out_n = hidden_n W_out,e, and B3, with `gates` blocks of columns and rows: out_n = dz_n W_in,e.

    Rows of experts of width 0 get zeros.
    """
    n_experts = plan.shape[1] - 1
    launch(
        _down_kernel, programs(out.device), left, weights, plan, out, out.shape[1], n_experts,
        GATES=gates, PRECISION=precision(), BM=blocks.rows, BD=blocks.model, BK=blocks.inner, GROUP=_GROUP,
        STEPS=search_steps(n_experts), **blocks.row_options(),
    )  # fmt: skip


def combine(rows: Tensor, weight: Tensor | None, order: Tensor, starts: Tensor) -> Tensor:
    """F3: sum of each token's rows, times their weights where given, in fp32 and always in row order; B5 without.

    Token t has the rows `order[starts[t]:starts[t+1]]`, none included.
    """
    n_tokens, d = len(starts) - 1, rows.shape[1]
    out = rows.new_empty(n_tokens, d)
    if not out.numel():
        return out
    block = min(1024, power_of_two(d))
    launch(
        _combine_kernel, n_tokens * -(-d // block), rows, rows if weight is None else weight, order, starts, out, d,
        WEIGHTED=weight is not None, BD=block,
    )  # fmt: skip
    return out


def precision() -> str:
    """How products of float32 are computed: as they are, or as TF32 where PyTorch was told to allow it."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@triton.jit
@no_type_check
def _act(z, ACT: tl.constexpr):
    """The activations of `ops.activations`, in fp32."""
    if ACT == "silu":
        y = z * tl.sigmoid(z)
    elif ACT == "gelu":
        y = 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        # (1 + tanh u) / 2 = sigmoid(2 u)
        y = z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    elif ACT == "relu":
        y = tl.where(z < 0, 0.0, z)
    else:
        y = z
    return y


@triton.jit
@no_type_check
def _up_kernel(x, token, w_in, plan, z, hidden, d: tl.constexpr, n_experts,
               GATES: tl.constexpr, ACT: tl.constexpr, SAVE_Z: tl.constexpr, SAVE_HIDDEN: tl.constexpr,
               PRECISION: tl.constexpr, BM: tl.constexpr, BU: tl.constexpr, BK: tl.constexpr,
               GROUP: tl.constexpr, STEPS: tl.constexpr):  # fmt: skip
    prefix = plan + _UP * (n_experts + 1)
    for tile in range(tl.program_id(0), tl.load(prefix + n_experts).to(tl.int32), tl.num_programs(0)):
        e = _owner(prefix, n_experts, tile, STEPS)
        row, n, unit, w, start = _expert(plan, n_experts + 1, e)
        local = tile - tl.load(prefix + e).to(tl.int32)
        i, j = _place(local, tl.cdiv(n, BM), tl.cdiv(w, BU), GROUP)
        r = i * BM + tl.arange(0, BM)
        u = j * BU + tl.arange(0, BU)
        x_row = x + tl.load(token + row + r, mask=r < n, other=0).to(tl.int64) * d
        gate_row = w_in + (unit * GATES + u) * d
        gate = tl.zeros((BM, BU), tl.float32)
        value = tl.zeros((BM, BU), tl.float32)
        for k in range(0, d, BK):
            c = k + tl.arange(0, BK)
            a = tl.load(x_row[:, None] + c[None, :], mask=(r < n)[:, None] & (c < d)[None, :], other=0.0)
            ok = (c < d)[:, None] & (u < w)[None, :]
            b = tl.load(gate_row[None, :] + c[:, None], mask=ok, other=0.0)
            gate = tl.dot(a, b, gate, input_precision=PRECISION)
            if GATES == 2:
                b = tl.load((gate_row + w.to(tl.int64) * d)[None, :] + c[:, None], mask=ok, other=0.0)
                value = tl.dot(a, b, value, input_precision=PRECISION)
        # what the backward pass will read is what the activation sees; beyond w lie zeros, also for infinite x
        gate = tl.where((u < w)[None, :], gate, 0.0).to(x.dtype.element_ty)
        value = tl.where((u < w)[None, :], value, 0.0).to(x.dtype.element_ty)
        w8 = _padded(w)
        at = start + r.to(tl.int64) * w8
        keep = (r < n)[:, None] & (u < w8)[None, :]
        if SAVE_Z:
            z_at = z + (at * GATES)[:, None] + u[None, :]
            tl.store(z_at, gate, mask=keep)
            if GATES == 2:
                tl.store(z_at + w8, value, mask=keep)
        if SAVE_HIDDEN:
            h = _act(gate.to(tl.float32), ACT)
            if GATES == 2:
                h = h * value.to(tl.float32)
            tl.store(hidden + at[:, None] + u[None, :], h.to(x.dtype.element_ty), mask=keep)


@triton.jit
@no_type_check
def _down_kernel(left, weights, plan, out, d: tl.constexpr, n_experts,
                 GATES: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
                 GROUP: tl.constexpr, STEPS: tl.constexpr):  # fmt: skip
    stride = n_experts + 1
    prefix = plan + _DOWN * stride
    for tile in range(tl.program_id(0), tl.load(prefix + n_experts).to(tl.int32), tl.num_programs(0)):
        slot = _owner(prefix, n_experts, tile, STEPS)
        row, n, unit, w, start = _expert(plan, stride, tl.load(plan + _DOWN_ORDER * stride + slot))
        local = tile - tl.load(prefix + slot).to(tl.int32)
        i, j = _place(local, tl.cdiv(n, BM), tl.cdiv(d, BD), GROUP)
        r = i * BM + tl.arange(0, BM)
        c = j * BD + tl.arange(0, BD)
        w8 = _padded(w)
        left_row = left + (start + r.to(tl.int64) * w8) * GATES
        block = weights + unit * GATES * d
        # two accumulators, because one shared by both products was miscompiled elsewhere (Liger-Kernel 1413)
        first = tl.zeros((BM, BD), tl.float32)
        second = tl.zeros((BM, BD), tl.float32)
        for k in range(0, w, BK):
            u = k + tl.arange(0, BK)
            a_ok = (r < n)[:, None] & (u < w8)[None, :]
            b_ok = (u < w)[:, None] & (c < d)[None, :]
            b_at = block + (u.to(tl.int64) * d)[:, None] + c[None, :]
            a = tl.load(left_row[:, None] + u[None, :], mask=a_ok, other=0.0)
            b = tl.load(b_at, mask=b_ok, other=0.0)
            first = tl.dot(a, b, first, input_precision=PRECISION)
            if GATES == 2:
                a = tl.load(left_row[:, None] + (w8 + u)[None, :], mask=a_ok, other=0.0)
                b = tl.load(b_at + w.to(tl.int64) * d, mask=b_ok, other=0.0)
                second = tl.dot(a, b, second, input_precision=PRECISION)
        at = out + ((row + r) * d)[:, None] + c[None, :]
        tl.store(at, (first + second).to(out.dtype.element_ty), mask=(r < n)[:, None] & (c < d)[None, :])


@triton.jit
@no_type_check
def _combine_kernel(rows, weight, order, starts, out, d: tl.constexpr, WEIGHTED: tl.constexpr, BD: tl.constexpr):
    n_blocks = tl.cdiv(d, BD)
    t = (tl.program_id(0) // n_blocks).to(tl.int64)
    c = tl.program_id(0) % n_blocks * BD + tl.arange(0, BD)
    total = tl.zeros((BD,), tl.float32)
    for i in range(tl.load(starts + t), tl.load(starts + t + 1)):
        r = tl.load(order + i)
        row = tl.load(rows + r * d + c, mask=c < d, other=0.0).to(tl.float32)
        if WEIGHTED:
            row = row * tl.load(weight + r).to(tl.float32)
        total += row
    tl.store(out + t * d + c, total.to(out.dtype.element_ty), mask=c < d)

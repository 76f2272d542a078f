"""Triton kernels for few rows in any order: one program for each (row, part of the result), weights read once.

Which expert a row meets is known on the device only: there are programs as if every expert were the widest, and those
beyond their expert's width do nothing.
"""

from typing import NamedTuple, no_type_check

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from moestro.ops.triton_ffn_forward import _act
from moestro.ops.triton_ffn_plan import interpreted, launch


class Rows(NamedTuple):
    """Row n is of token[n] and expert[n]; expert e owns units[e] to units[e + 1], at most `widest`."""

    token: Tensor
    expert: Tensor
    units: Tensor
    widest: int


class Sizes(NamedTuple):
    """Units and columns of a tile in each direction, and units whose sum one program computes on the way down."""

    up_units: int = 32
    up_columns: int = 128
    down_units: int = 32
    down_columns: int = 128
    split: int = 256


def sizes() -> Sizes:
    """Tile sizes by rule."""
    return Sizes(16, 16, 16, 16, 32) if interpreted() else Sizes()


def up(x: Tensor, rows: Rows, w_in: Tensor, activation: str, gates: int) -> Tensor:
    """hidden_n = act(gate) * up of every row, [n, widest]; beyond an expert's width nothing is written."""
    n, d, size = len(rows.token), x.shape[1], sizes()
    hidden = x.new_empty(n, rows.widest)
    grid = n, triton.cdiv(rows.widest, size.up_units)
    if n and rows.widest:
        launch(
            _few_up_kernel, grid, x, rows.token, rows.expert, rows.units, w_in, hidden, d, rows.widest,
            GATES=gates, ACT=activation, BU=size.up_units, BK=size.up_columns,
        )  # fmt: skip
    return hidden


def down(hidden: Tensor, rows: Rows, w_out: Tensor) -> Tensor:
    """Parts of hidden_n W_out,e for every row, [n, parts, d] in float32; parts that an expert lacks are not written."""
    n, d, size = len(rows.token), w_out.shape[1], sizes()
    parts = -(-rows.widest // size.split)
    partial = hidden.new_empty(n, parts, d, dtype=torch.float32)
    if partial.numel():
        launch(
            _few_down_kernel, (n, triton.cdiv(d, size.down_columns), parts),
            hidden, rows.expert, rows.units, w_out, partial, d, rows.widest, parts,
            SPLIT=size.split, BU=size.down_units, BD=size.down_columns,
        )  # fmt: skip
    return partial


def combine(partial: Tensor, rows: Rows, weight: Tensor, like: Tensor) -> Tensor:
    """y_t = sum over the rows of token t of weight_n times the sum of the row's parts, always in the same order."""
    n, parts, d = partial.shape
    y, size = like.new_empty(len(like), d), sizes()
    if y.numel():
        launch(
            _few_combine_kernel, (len(y), triton.cdiv(d, size.down_columns)),
            partial, rows.token, rows.expert, rows.units, weight, y, n, d, parts,
            SPLIT=size.split, BD=size.down_columns,
        )  # fmt: skip
    return y


@triton.jit
@no_type_check
def _few_up_kernel(x, token, expert, units, w_in, hidden, d: tl.constexpr, widest, GATES: tl.constexpr,
                   ACT: tl.constexpr, BU: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    e = tl.load(expert + n)
    unit = tl.load(units + e)
    w = tl.load(units + e + 1) - unit
    u = tl.program_id(1) * BU + tl.arange(0, BU)
    if tl.program_id(1) * BU < w:
        x_row = x + tl.load(token + n) * d
        gate_row = w_in + (unit * GATES + u) * d
        gate = tl.zeros((BU,), tl.float32)
        value = tl.zeros((BU,), tl.float32)
        for k in range(0, d, BK):
            c = k + tl.arange(0, BK)
            a = tl.load(x_row + c, mask=c < d, other=0.0).to(tl.float32)
            ok = (u < w)[:, None] & (c < d)[None, :]
            b = tl.load(gate_row[:, None] + c[None, :], mask=ok, other=0.0).to(tl.float32)
            gate += tl.sum(b * a[None, :], axis=1)
            if GATES == 2:
                b = tl.load((gate_row + w * d)[:, None] + c[None, :], mask=ok, other=0.0).to(tl.float32)
                value += tl.sum(b * a[None, :], axis=1)
        # rounded where pre-activations are rounded elsewhere
        h = _act(gate.to(x.dtype.element_ty).to(tl.float32), ACT)
        if GATES == 2:
            h = h * value.to(x.dtype.element_ty).to(tl.float32)
        tl.store(hidden + n * widest + u, h.to(hidden.dtype.element_ty), mask=u < w)


@triton.jit
@no_type_check
def _few_down_kernel(hidden, expert, units, w_out, partial, d: tl.constexpr, widest, parts, SPLIT: tl.constexpr,
                     BU: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    part = tl.program_id(2)
    e = tl.load(expert + n)
    unit = tl.load(units + e)
    w = tl.load(units + e + 1) - unit
    c = tl.program_id(1) * BD + tl.arange(0, BD)
    if part * SPLIT < w:
        total = tl.zeros((BD,), tl.float32)
        for k in tl.static_range(0, SPLIT, BU):
            u = part * SPLIT + k + tl.arange(0, BU)
            h = tl.load(hidden + n * widest + u, mask=u < w, other=0.0).to(tl.float32)
            ok = (u < w)[:, None] & (c < d)[None, :]
            b = tl.load(w_out + ((unit + u) * d)[:, None] + c[None, :], mask=ok, other=0.0).to(tl.float32)
            total += tl.sum(h[:, None] * b, axis=0)
        tl.store(partial + (n * parts + part) * d + c, total, mask=c < d)


@triton.jit
@no_type_check
def _few_combine_kernel(partial, token, expert, units, weight, y, n_rows, d: tl.constexpr, parts,
                        SPLIT: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BD + tl.arange(0, BD)
    total = tl.zeros((BD,), tl.float32)
    row_at = partial + c
    for n in range(0, n_rows):
        if tl.load(token + n) == t:
            e = tl.load(expert + n)
            w = tl.load(units + e + 1) - tl.load(units + e)
            row = tl.zeros((BD,), tl.float32)
            for part in range(0, tl.cdiv(w, SPLIT)):
                row += tl.load(row_at + part * d, mask=c < d, other=0.0)
            total += row * tl.load(weight + n).to(tl.float32)
        row_at += parts * d
    tl.store(y + t * d + c, total.to(y.dtype.element_ty), mask=c < d)

"""Rows of tables that tokens meet, any number each: dot products with them and sums of them, as two linear operations
of which experts of one neuron, of several, gated ones and plain values are made."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from moestro.ops import backend
from moestro.ops.activations import activation as find
from moestro.ops.precision import compute_dtype, without_autocast
from moestro.ops.row_gradients import TableGradients
from moestro.ops.row_operations import RowOperations, row_dtypes, row_operations


@dataclass(frozen=True)
class Met:
    """Token `token[n]`, in falling numbers never, meets row `row[n]` of some tables; there are `n_tokens`."""

    token: Int[Tensor, "n"]
    row: Int[Tensor, "n"]
    n_tokens: int

    @cached_property
    def starts(self) -> Int[Tensor, "t"]:
        """Where each token's rows begin."""
        return torch.searchsorted(self.token, torch.arange(self.n_tokens, device=self.token.device))

    @cached_property
    def _segments(self) -> dict[tuple[RowOperations, int, bool], Any]:
        return {}

    def segments(self, rows: RowOperations, n_rows: int, sparse: bool) -> Any:
        """`rows.segments`: the places of every row of the tables, sorted once for all of them."""
        key = rows, n_rows, sparse
        if key not in self._segments:
            self._segments[key] = rows.segments(self.row, n_rows, sparse)
        return self._segments[key]


@dataclass(frozen=True)
class Columns:
    """What makes sums over a token's whole width of sums over the columns that are here, where tables hold only some
    columns of their rows: `dots` sums dot products going forward, `slopes` sums their gradients going backward."""

    dots: Callable[[Tensor], Tensor]
    slopes: Callable[[Tensor], Tensor]


def met_experts(
    x: Float[Tensor, "t d"],
    met: Met,
    weight: Float[Tensor, "n"],
    tables: Mapping[str, Float[Tensor, "e d"]],
    activation: str = "none",
    sparse_gradients: bool = False,
    columns: Columns | None = None,
) -> Float[Tensor, "t d"]:
    """y_t = sum over the rows n that token t meets of weight_n * hidden_n * down[row_n]; hidden_n is act(up[row_n] .
    x_t), with a table `gate` act(gate[row_n] . x_t) * (up[row_n] . x_t), and 1 without `up`.

    `tables` are `down` and, where there are such, `up` and `gate`. Dtypes and `sparse_gradients` as in
    `singleton_experts`. Saves x and a few numbers a row.
    """
    outside = compute_dtype(x)
    down, inner = tables["down"], [tables[name] for name in ("gate", "up") if name in tables]
    rows = row_operations(x, weight, *inner, down)
    inside, stored = row_dtypes(rows.widens, down, outside, sparse_gradients)
    down, inner = down.to(stored), [table.to(stored) for table in inner]
    x, weight = x.to(outside).to(inside), weight.to(inside)
    with without_autocast(x):
        z = [met_dots(table, met, x, sparse_gradients, rows) for table in inner]
        if columns is not None and z:
            z = list(columns.dots(torch.stack(z)))
        coefficient = weight
        if z:
            hidden = find(activation).forward(z[0])
            coefficient = weight * (hidden if len(z) == 1 else hidden * z[1])
        if columns is not None:
            coefficient = columns.slopes(coefficient)
        y = met_sums(down, met, coefficient, sparse_gradients, rows)
    return y.to(outside)


def met_dots(table: Tensor, met: Met, x: Float[Tensor, "t d"], sparse: bool, rows: RowOperations) -> Float[Tensor, "n"]:
    """out_n = table[row_n] . x_(token_n)."""
    if backend.active() == "reference":
        return (F.embedding(met.row, table, sparse=sparse).to(x.dtype) * x[met.token]).sum(-1)
    return _dots(table, met, x, sparse, rows)  # type: ignore[call-arg]


def met_sums(
    table: Tensor, met: Met, coefficient: Float[Tensor, "n"], sparse: bool, rows: RowOperations
) -> Float[Tensor, "t d"]:
    """out_t = sum over the rows n of token t of coefficient_n * table[row_n]."""
    if backend.active() == "reference":
        each = F.embedding(met.row, table, sparse=sparse).to(coefficient.dtype) * coefficient[:, None]
        return each.new_zeros(met.n_tokens, each.shape[1]).index_add(0, met.token, each)
    return _sums(table, met, coefficient, sparse, rows)  # type: ignore[call-arg]


@torch.compiler.disable
def _dots(table: Tensor, met: Met, x: Tensor, sparse: bool, rows: RowOperations) -> Tensor:
    return _MetDots.apply(table, met, x, sparse, rows)  # type: ignore[return-value]


@torch.compiler.disable
def _sums(table: Tensor, met: Met, coefficient: Tensor, sparse: bool, rows: RowOperations) -> Tensor:
    return _MetSums.apply(table, met, coefficient, sparse, rows)  # type: ignore[return-value]


class _MetDots(torch.autograd.Function):
    @staticmethod
    def forward(ctx, table, met, x, sparse, rows):  # type: ignore[override]
        ctx.save_for_backward(table, x)
        ctx.met, ctx.sparse, ctx.rows, ctx.gradients = met, sparse, rows, TableGradients({0: table})
        return rows.ragged_dots(table, met.row, x, met.token)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):  # type: ignore[override]
        table, x = ctx.saved_tensors
        met = ctx.met
        dx = ctx.rows.ragged_sums(table, met.row, dout.contiguous(), met.starts) if ctx.needs_input_grad[2] else None
        return _table_gradient(ctx, len(table), x, dout), None, dx, None, None


class _MetSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, table, met, coefficient, sparse, rows):  # type: ignore[override]
        ctx.save_for_backward(table, coefficient)
        ctx.met, ctx.sparse, ctx.rows, ctx.gradients = met, sparse, rows, TableGradients({0: table})
        return rows.ragged_sums(table, met.row, coefficient.contiguous(), met.starts)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[override]
        table, coefficient = ctx.saved_tensors
        met, dy = ctx.met, dy.contiguous()
        along = ctx.rows.ragged_dots(table, met.row, dy, met.token) if ctx.needs_input_grad[2] else None
        return _table_gradient(ctx, len(table), dy, coefficient), None, along, None, None


def _table_gradient(ctx, n_rows: int, source: Tensor, coefficient: Tensor) -> Tensor | None:
    met = ctx.met
    (gradient,) = ctx.gradients.of(
        ctx.needs_input_grad,
        lambda: met.segments(ctx.rows, n_rows, ctx.sparse),
        lambda order: met.token[order],
        {0: (source, coefficient)},
    )
    return gradient

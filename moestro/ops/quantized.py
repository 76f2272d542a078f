"""Tables in 8 bits a number, with a scale for every row: read as they are, widened and replaced row by row."""

from collections.abc import Callable
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from moestro.ops import backend, triton_peer
from moestro.ops.activations import activation as find
from moestro.ops.ffn import wants_gradient
from moestro.ops.precision import compute_dtype, without_autocast
from moestro.ops.rounding import stochastic_float8, stochastic_int8
from moestro.ops.row_gradients import FactoredRows, factored, spans
from moestro.ops.row_operations import RowOperations, row_operations
from moestro.ops.tables import new_table

Storage = Literal["int8", "fp8"]
# The dtype of the codes and the largest of them.
CODES = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}
LARGEST = dict(CODES.values())
_ROUNDED = {torch.int8: stochastic_int8, torch.float8_e4m3fn: stochastic_float8}


class QuantizedTable(NamedTuple):
    """Row e is scale[e] * codes[e], codes in int8 or float8 (e4m3fn). A table that learns has a list, `pending`, to
    which backward passes add its gradients in factors."""

    codes: Tensor
    scale: Tensor
    pending: list[FactoredRows] | None = None

    def rows(self, ids: Int[Tensor, "n"], dtype: torch.dtype) -> Float[Tensor, "n d"]:
        """Rows as numbers."""
        return self.codes.index_select(0, ids).to(dtype) * self.scale[ids, None].to(dtype)

    def replace_rows(self, ids: Int[Tensor, "n"], rows: Float[Tensor, "n d"], key: int) -> None:
        """Write rows, each number as one of the two codes beside it, at random, so that it is right on average
        (`ops.rounding`). A row keeps its scale while its largest number has a code above a quarter of the largest: what
        does not change is then not rounded again. Else its scale becomes a power of two. A row with what is not finite
        becomes no number."""
        largest, scale = LARGEST[self.codes.dtype], self.scale[ids].float()
        most = rows.abs().amax(1).float() if rows.shape[1] else torch.zeros_like(scale)
        keeps = (most <= largest * scale) & (most > largest / 4 * scale) | (most == 0)
        power = torch.ldexp(torch.ones_like(most), (most / largest).frexp().exponent.clamp(min=-126))
        scale = torch.where(keeps, scale, torch.where(most.isfinite(), power, torch.nan))
        self.scale.index_copy_(0, ids, scale.to(self.scale.dtype))
        scaled = (rows.float() / scale[:, None]).clamp(-largest, largest)
        codes = _ROUNDED[self.codes.dtype](scaled, ids, key)
        # index_copy_ does not know float8
        self.codes.view(torch.uint8).index_copy_(0, ids, codes.view(torch.uint8))


@torch.no_grad()
def quantize_rows(table: Float[Tensor, "e d"], storage: str) -> QuantizedTable:
    """Each row's largest number becomes the largest code, every number the nearest code. Off by at most half a scale in
    int8, that is 1/254 of the row's largest number; in fp8 by 1/16 of itself, or scale / 1024 near 0.

    Raises: ValueError for an unknown storage.
    """
    if storage not in CODES:
        raise ValueError(f"storage={storage!r}, allowed: {', '.join(CODES)}")
    dtype, largest = CODES[storage]
    codes = new_table(*table.shape, dtype=dtype, device=table.device)
    scale = torch.ones(len(table), device=table.device)
    for start, stop in spans(len(table), table.shape[1], table.device):
        rows = table[start:stop].float()
        step = rows.abs().amax(1) / largest
        scale[start:stop] = torch.where(step > 0, step, 1.0)
        scaled = (rows / scale[start:stop, None]).clamp(-largest, largest)
        codes[start:stop] = (scaled.round() if dtype == torch.int8 else scaled).to(dtype)
    return QuantizedTable(codes, scale)


def quantized_singletons(
    x: Float[Tensor, "t d"],
    ids: Int[Tensor, "t k"],
    weight: Float[Tensor, "t k"],
    up: QuantizedTable,
    down: QuantizedTable,
    activation: str,
    gate: QuantizedTable | None = None,
) -> Float[Tensor, "t d"]:
    """`singleton_experts` of tables in 8 bits: a row's scale is a factor of its dot product or of its weight, so codes
    are all that is gathered, a quarter of the bytes of float32. Differentiable in x and weight; tables with `pending`
    get the factors of their gradients there, as if rows were the numbers that they stand for.
    Arithmetic in float32 at least; with native kernels where it is float32 and the tables are on the CPU, and with
    Triton's, which take no float64."""
    outside = compute_dtype(x)
    inside = torch.promote_types(outside, torch.float32)
    x, weight, act = x.to(outside), weight.to(inside), find(activation).forward
    if up.pending is not None and torch.is_grad_enabled() and not x.requires_grad:
        x = x.detach().requires_grad_()  # else the tables that meet it would see no backward pass
    if backend.active() != "triton" or wants_gradient(x, weight):
        x = x.to(inside)
    tables = [table for table in (gate, up, down) if table is not None]
    if backend.active() == "triton":
        with without_autocast(x):
            return triton_peer.quantized_singletons(x, ids, weight, tables, activation).to(outside)
    codes, scales, _ = zip(*tables, strict=True)
    rows = row_operations(x, weight, *scales, codes=codes)
    segments = cache(lambda: rows.segments(ids.flatten(), len(up.codes), True))
    with without_autocast(x):
        along = _dots(up, ids, x, rows, segments)  # type: ignore[call-arg]
        opened = act(along) if gate is None else act(_dots(gate, ids, x, rows, segments))  # type: ignore[call-arg]
        hidden = opened if gate is None else opened * along
        return _sums(down, ids, hidden * weight, rows, segments).to(outside)  # type: ignore[call-arg]


@torch.compiler.disable
def _dots(table: QuantizedTable, ids: Tensor, x: Tensor, rows: RowOperations, segments: Callable[[], Any]) -> Tensor:
    return _Dots.apply(*table, ids, x, rows, segments)  # type: ignore


@torch.compiler.disable
def _sums(
    table: QuantizedTable, ids: Tensor, weight: Tensor, rows: RowOperations, segments: Callable[[], Any]
) -> Tensor:
    return _Sums.apply(*table, ids, weight, rows, segments)  # type: ignore


class _Dots(torch.autograd.Function):
    """out_tk = row ids_tk . x_t. It and `_Sums` are each other's adjoint."""

    @staticmethod
    def forward(ctx, codes, scale, pending, ids, x, rows, segments):  # type: ignore[override]
        ctx.save_for_backward(codes, scale, ids, None if pending is None else x)
        ctx.rows, ctx.pending, ctx.segments = rows, pending, segments
        return rows.dots(codes, ids, x, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):  # type: ignore[override]
        codes, scale, ids, x = ctx.saved_tensors
        if ctx.pending is not None:
            _leave(ctx, ids, x, dout)
        dx = ctx.rows.weighted_rows(codes, ids, dout, scale) if ctx.needs_input_grad[4] else None
        return None, None, None, None, dx, None, None


class _Sums(torch.autograd.Function):
    """out_t = sum_k weight_tk * row ids_tk."""

    @staticmethod
    def forward(ctx, codes, scale, pending, ids, weight, rows, segments):  # type: ignore[override]
        ctx.save_for_backward(codes, scale, ids, None if pending is None else weight)
        ctx.rows, ctx.pending, ctx.segments = rows, pending, segments
        return rows.weighted_rows(codes, ids, weight, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):  # type: ignore[override]
        codes, scale, ids, weight = ctx.saved_tensors
        if ctx.pending is not None:
            _leave(ctx, ids, dout, weight)
        dweight = ctx.rows.dots(codes, ids, dout.contiguous(), scale) if ctx.needs_input_grad[4] else None
        return None, None, None, None, dweight, None, None


def _leave(ctx: Any, ids: Tensor, source: Tensor, coefficient: Tensor) -> None:
    """The gradient of row e is the sum over the pairs (t, k) of expert e of coefficient_tk * source_t."""
    segments = ctx.segments()
    token = segments.order // max(1, ids.shape[1])
    ctx.pending.append(factored(segments, source, token, coefficient.flatten()))

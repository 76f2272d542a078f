"""Tables in 8 bits a number, with a scale for every row: read as they are, widened row by row."""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from moestro.ops.activations import activation as find
from moestro.ops.precision import compute_dtype, without_autocast
from moestro.ops.row_gradients import spans
from moestro.ops.row_operations import RowOperations, row_operations
from moestro.ops.tables import new_table

Storage = Literal["int8", "fp8"]
# The dtype of the codes and the largest of them.
CODES = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}


class QuantizedTable(NamedTuple):
    """Row e is scale[e] * codes[e], codes in int8 or float8 (e4m3fn)."""

    codes: Tensor
    scale: Tensor

    def rows(self, ids: Int[Tensor, "n"], dtype: torch.dtype) -> Float[Tensor, "n d"]:
        """Rows as numbers."""
        return self.codes.index_select(0, ids).to(dtype) * self.scale[ids, None].to(dtype)


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
    are all that is gathered, a quarter of the bytes of float32. Differentiable in x and weight; the tables are fixed.
    Arithmetic in float32 at least; with native kernels where it is float32 and the tables are on the CPU."""
    outside = compute_dtype(x)
    inside = torch.promote_types(outside, torch.float32)
    x, weight, act = x.to(outside).to(inside), weight.to(inside), find(activation).forward
    codes, scales = zip(*(table for table in (up, down, gate) if table is not None), strict=True)
    rows = row_operations(x, weight, *scales, codes=codes)
    with without_autocast(x):
        along = _dots(up, ids, x, rows)  # type: ignore[call-arg]
        opened = act(along) if gate is None else act(_dots(gate, ids, x, rows))  # type: ignore[call-arg]
        hidden = opened if gate is None else opened * along
        return _sums(down, ids, hidden * weight, rows).to(outside)  # type: ignore[call-arg]


@torch.compiler.disable
def _dots(table: QuantizedTable, ids: Tensor, x: Tensor, rows: RowOperations) -> Tensor:
    return _Dots.apply(*table, ids, x, rows)  # type: ignore


@torch.compiler.disable
def _sums(table: QuantizedTable, ids: Tensor, weight: Tensor, rows: RowOperations) -> Tensor:
    return _Sums.apply(*table, ids, weight, rows)  # type: ignore


class _Dots(torch.autograd.Function):
    """out_tk = row ids_tk . x_t. It and `_Sums` are each other's adjoint."""

    @staticmethod
    def forward(ctx, codes, scale, ids, x, rows):  # type: ignore[override]
        ctx.save_for_backward(codes, scale, ids)
        ctx.rows = rows
        return rows.dots(codes, ids, x, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):  # type: ignore[override]
        codes, scale, ids = ctx.saved_tensors
        return None, None, None, ctx.rows.weighted_rows(codes, ids, dout, scale), None


class _Sums(torch.autograd.Function):
    """out_t = sum_k weight_tk * row ids_tk."""

    @staticmethod
    def forward(ctx, codes, scale, ids, weight, rows):  # type: ignore[override]
        ctx.save_for_backward(codes, scale, ids)
        ctx.rows = rows
        return rows.weighted_rows(codes, ids, weight, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):  # type: ignore[override]
        codes, scale, ids = ctx.saved_tensors
        return None, None, None, ctx.rows.dots(codes, ids, dout.contiguous(), scale), None

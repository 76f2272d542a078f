"""Who fetches rows of tables, and in which dtypes: the same for all operations that are made of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moestro.ops import backend, table_rows
from moestro.ops.native import table_rows as native_table_rows


class RowOperations(NamedTuple):
    """The operations of `table_rows`, or the same of `native.table_rows`. `widens`: they read tables in their own
    dtype, whatever it is, and compute in float32."""

    dots: Callable[..., Tensor]
    weighted_rows: Callable[..., Tensor]
    ragged_dots: Callable[..., Tensor]
    ragged_sums: Callable[..., Tensor]
    segments: Callable[[Tensor, int, bool], Any]
    widens: bool


PLAIN = RowOperations(
    table_rows.dots,
    table_rows.weighted_rows,
    table_rows.ragged_dots,
    table_rows.ragged_sums,
    table_rows.Segments,
    widens=False,
)
NATIVE = RowOperations(
    native_table_rows.dots,
    native_table_rows.weighted_rows,
    native_table_rows.ragged_dots,
    native_table_rows.ragged_sums,
    native_table_rows.Segments,
    widens=True,
)


def row_operations(*tensors: Tensor, codes: tuple[Tensor, ...] = ()) -> RowOperations:
    """Those on compiled kernels where `backend.runs_native` says so of the tensors, and they read tables like `codes`;
    else those of torch. An operation asks once, before its forward pass, and keeps the answer for the backward pass."""
    if backend.runs_native(*tensors):
        return NATIVE if all(map(native_table_rows.reads, codes)) else PLAIN
    return PLAIN


def row_dtypes(widened: bool, table: Tensor, outside: torch.dtype, sparse: bool) -> tuple[torch.dtype, torch.dtype]:
    """The dtype of the arithmetic and that in which tables are read; kernels that widen what they read copy none."""
    if widened:
        return torch.float32, table.dtype
    return (torch.promote_types(table.dtype, torch.float32), table.dtype) if sparse else (outside, outside)

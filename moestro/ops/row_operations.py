"""Who fetches rows of tables, and in which dtypes: the same for all operations that are made of them."""

from types import ModuleType

import torch
from torch import Tensor

from moestro.ops import backend, table_rows
from moestro.ops.native import table_rows as native_table_rows


def row_operations(*tensors: Tensor, codes: tuple[Tensor, ...] = ()) -> ModuleType:
    """`native.table_rows` where `backend.runs_native` says so of the tensors, and its kernels read tables like `codes`;
    else `table_rows`. An operation asks once, before its forward pass, and keeps the answer for the backward pass."""
    read = all(table.device.type == "cpu" and table.dtype in native_table_rows.FORMATS for table in codes)
    return native_table_rows if read and backend.runs_native(*tensors) else table_rows


def widens(rows: ModuleType) -> bool:
    """Whether these operations read tables in their own dtype, whatever it is, and compute in float32."""
    return rows is native_table_rows


def row_dtypes(widened: bool, table: Tensor, outside: torch.dtype, sparse: bool) -> tuple[torch.dtype, torch.dtype]:
    """The dtype of the arithmetic and that in which tables are read; kernels that widen what they read copy none."""
    if widened:
        return torch.float32, table.dtype
    return (torch.promote_types(table.dtype, torch.float32), table.dtype) if sparse else (outside, outside)

"""`ops.row_adamw` on its compiled kernel (`row_adamw.c`): one pass over the rows, their gradient included."""

from torch import Tensor

from moestro.ops import native
from moestro.ops.native.table_rows import FORMATS


def adamw_rows(
    table: Tensor,
    scale: Tensor | None,
    state: tuple[Tensor, ...],
    ids: Tensor,
    gradient: tuple[Tensor, ...],
    numbers: tuple[int | float, ...],
) -> None:
    """Replace rows `ids` of `table`, in a format of `table_rows`, with the `scale` of its rows where it holds codes,
    and of `state`: both moments, clocks in int32 and charged decay in float64. `gradient` is (values,), or (order,
    starts, token, source, coefficient); `numbers` fill the end of the kernel's struct.

    Raises: ValueError for ids outside the table or out of order, which the kernel would trust.
    """
    if len(ids) and not (0 <= int(ids[0]) and int(ids[-1]) < len(table) and bool((ids[1:] > ids[:-1]).all())):
        raise ValueError(f"row ids must ascend within 0 to {len(table) - 1}, each once")
    given = (*gradient, 0, 0, 0, 0, 0) if len(gradient) == 1 else (0, *gradient)
    fields = table, 0 if scale is None else scale, *state, ids, *given, table.shape[1], FORMATS[table.dtype], *numbers
    native.run("row_adamw", native.even_parts(len(ids)), *fields)

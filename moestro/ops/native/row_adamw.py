"""`ops.row_adamw` on its compiled kernel (`row_adamw.c`): one pass over the rows, their gradient included."""

import torch
from torch import Tensor

from moestro.ops import native


def adamw_rows(
    table: Tensor,
    moments: tuple[Tensor, Tensor],
    ids: Tensor,
    gradient: tuple[Tensor | int, ...],
    factors: tuple[Tensor | None, ...],
    numbers: tuple[int | float, ...],
) -> None:
    """Replace rows `ids` of `table` and `moments`. `gradient` is (values,), or (order, starts, token, source,
    coefficient); `factors` and `numbers` fill the end of the kernel's struct.

    Raises: ValueError for ids outside the table or out of order, which the kernel would trust.
    """
    if len(ids) and not (0 <= int(ids[0]) and int(ids[-1]) < len(table) and bool((ids[1:] > ids[:-1]).all())):
        raise ValueError(f"row ids must ascend within 0 to {len(table) - 1}, each once")
    given = gradient if len(gradient) > 1 else (*gradient, 0, 0, 0, 0, 0)
    given = given if len(given) == 6 else (0, *given)
    narrow = int(table.dtype == torch.bfloat16)
    fields = [0 if each is None else each for each in (*given, *factors)]
    native.run(
        "row_adamw", native.even_parts(len(ids)), table, *moments, ids, *fields, table.shape[1], narrow, *numbers
    )

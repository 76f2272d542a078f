"""The operations of `ops.table_rows` on compiled kernels (`table_rows.c`).

They read tables in float32, bfloat16, int8 or float8 (e4m3fn), and compute and answer in float32; no gathered row is
ever written, and the order of every sum is that of its ids, whatever the number of threads.
"""

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from moestro.ops import native

# As in table_rows.c.
FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.float8_e4m3fn: 3}


def reads(table: Tensor) -> bool:
    """Whether these operations read such a table."""
    return table.device.type == "cpu" and table.dtype in FORMATS


def dots(
    table: Shaped[Tensor, "e d"],
    ids: Int[Tensor, "t k"],
    x: Float[Tensor, "t d"],
    scale: Float[Tensor, "e"] | None = None,
) -> Float[Tensor, "t k"]:
    """out_tk = scale[ids_tk] * table[ids_tk] . x_t."""
    _require("rows_dot", x, (len(ids), table.shape[1]))
    out = torch.empty(ids.shape)
    _on_rows("rows_dot", out.numel(), table, scale, ids, None, x, out)
    return out


def weighted_rows(
    table: Shaped[Tensor, "e d"],
    ids: Int[Tensor, "t k"],
    coefficient: Float[Tensor, "t k"],
    scale: Float[Tensor, "e"] | None = None,
) -> Float[Tensor, "t d"]:
    """out_t = sum_k coefficient_tk * scale[ids_tk] * table[ids_tk]."""
    _require("rows_sum", coefficient, tuple(ids.shape))
    out = torch.empty(len(ids), table.shape[1])
    _on_rows("rows_sum", len(ids), table, scale, ids, None, coefficient, out)
    return out


def ragged_dots(
    table: Shaped[Tensor, "e d"], ids: Int[Tensor, "n"], x: Float[Tensor, "t d"], token: Int[Tensor, "n"]
) -> Float[Tensor, "n"]:
    """out_j = table[ids_j] . x[token_j]."""
    _require("rows_dot", x, (len(x), table.shape[1]))
    _require("rows_dot", token, tuple(ids.shape))
    out = torch.empty(len(ids))
    _on_rows("rows_dot", len(ids), table, None, ids, _valid(token, len(x), "tokens", "the rows of x"), x, out)
    return out


def ragged_sums(
    table: Shaped[Tensor, "e d"], ids: Int[Tensor, "n"], coefficient: Float[Tensor, "n"], starts: Int[Tensor, "t"]
) -> Float[Tensor, "t d"]:
    """out_t = sum of coefficient_j * table[ids_j] over the places j from starts_t up to those of t + 1."""
    _require("rows_sum", coefficient, tuple(ids.shape))
    starts = _valid(starts, len(ids) + 1, "starts", "the places of ids")
    if bool((starts.diff() < 0).any()):
        raise ValueError("rows_sum: starts that fall, allowed: places in ascending order")
    out = torch.empty(len(starts), table.shape[1])
    _on_rows("rows_sum", len(starts), table, None, ids, starts, coefficient, out)
    return out


def _require(kernel: str, factor: Tensor, shape: tuple[int, ...]) -> None:
    """Kernels would read past the end of a smaller one."""
    if tuple(factor.shape) != shape:
        raise ValueError(f"{kernel}: a factor of shape {list(factor.shape)}, allowed: {list(shape)}")


def _on_rows(
    kernel: str,
    items: int,
    table: Tensor,
    scale: Tensor | None,
    ids: Tensor,
    place: Tensor | None,
    factor: Tensor,
    out: Tensor,
) -> None:
    if scale is not None:
        _require(kernel, scale, (len(table),))
        scale = scale.contiguous().float()
    k = ids.shape[1] if ids.ndim == 2 else 1
    ids, table, factor = _valid(ids, len(table)), table.contiguous(), factor.contiguous().float()
    given = (each if each is not None else 0 for each in (scale, ids, place))
    sizes = ids.numel(), len(out), k, table.shape[1], FORMATS[table.dtype]
    native.run(kernel, native.even_parts(items), table, *given, factor, out, *sizes)


def _valid(ids: Tensor, n: int, what: str = "ids", of: str = "the rows of the table") -> Tensor:
    """Numbers of rows as kernels read them, who trust them: a row outside would be read from anywhere."""
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{what} in {ids.dtype}, allowed: int32, int64")
    if ids.numel():
        least, most = (int(v) for v in ids.aminmax())
        if least < 0 or most >= n:
            raise ValueError(f"{what} from {least} to {most}, allowed: 0 to {n - 1}, {of}")
    return ids.long().contiguous()


class Segments:
    """The places of `ids` in the order of the ids (`order`), and where those of each row that is met begin."""

    def __init__(self, ids: Int[Tensor, "n"], n_rows: int, sparse: bool) -> None:
        self.n_rows, self.sparse = n_rows, sparse
        ids = _valid(ids, n_rows)
        self.order, rows, starts = (ids.new_empty(len(ids) + extra) for extra in (0, 0, 1))
        count = ids.new_empty(1)
        native.run("sort_ids", [0, 1], ids, self.order, rows, starts, count, len(ids), n_rows)
        self.rows, self.starts = rows[: int(count)].clone(), starts[: int(count) + 1]

    def table_gradient(
        self, source: Float[Tensor, "t d"], token: Int[Tensor, "n"], coefficient: Float[Tensor, "n"]
    ) -> Tensor:
        """Row e = sum over the places j of id e of coefficient_j * source[token_j], [n_rows, d]; rows that are not met
        have zeros, or with `sparse` are absent (`torch.sparse_coo`, coalesced). `token` is in the order of the ids
        (`token_of[order]`), `coefficient` is not."""
        shape = (self.n_rows, source.shape[1])
        out = torch.empty(len(self.rows), shape[1]) if self.sparse else torch.zeros(shape)
        where = torch.arange(len(self.rows)) if self.sparse else self.rows
        factors = source.contiguous().float(), token.contiguous(), coefficient.contiguous().float()
        bounds = native.even_parts(len(self.rows))
        native.run("segment_sums", bounds, self.order, self.starts, where, *factors, out, shape[1])
        if not self.sparse:
            return out
        return torch.sparse_coo_tensor(self.rows[None], out, shape, is_coalesced=True, check_invariants=False)

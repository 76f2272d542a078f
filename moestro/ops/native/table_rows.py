"""The three operations of `ops.table_rows` on compiled kernels (`table_rows.c`).

They read tables in float32 or bfloat16, and compute and answer in float32; no gathered row is ever written, and the
order of every sum is that of its ids, whatever the number of threads.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moestro.ops import native


def dots(table: Float[Tensor, "e d"], ids: Int[Tensor, "t k"], x: Float[Tensor, "t d"]) -> Float[Tensor, "t k"]:
    """out_tk = table[ids_tk] . x_t."""
    out = torch.empty(ids.shape)
    _on_rows("rows_dot", table, ids, x, (len(ids), table.shape[1]), out)
    return out


def weighted_rows(
    table: Float[Tensor, "e d"], ids: Int[Tensor, "t k"], coefficient: Float[Tensor, "t k"]
) -> Float[Tensor, "t d"]:
    """out_t = sum_k coefficient_tk * table[ids_tk]."""
    out = torch.empty(len(ids), table.shape[1])
    _on_rows("rows_sum", table, ids, coefficient, tuple(ids.shape), out)
    return out


def _on_rows(kernel: str, table: Tensor, ids: Tensor, factor: Tensor, shape: tuple[int, ...], out: Tensor) -> None:
    """`shape` is the factor's: kernels would read past the end of a smaller one."""
    t, k = ids.shape
    if tuple(factor.shape) != shape:
        raise ValueError(f"{kernel}: a factor of shape {list(factor.shape)}, allowed: {list(shape)}")
    table, ids, factor = table.contiguous(), _valid(ids, len(table)), factor.contiguous().float()
    narrow = int(table.dtype == torch.bfloat16)
    native.run(kernel, native.even_parts(t), table, ids, factor, out, t, k, table.shape[1], narrow)


def _valid(ids: Tensor, n_experts: int) -> Tensor:
    """Ids as kernels read them, who trust them: one outside the table would be read from anywhere."""
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"ids in {ids.dtype}, allowed: int32, int64")
    if ids.numel():
        least, most = (int(v) for v in ids.aminmax())
        if least < 0 or most >= n_experts:
            raise ValueError(f"ids from {least} to {most}, allowed: 0 to {n_experts - 1}, the rows of the table")
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

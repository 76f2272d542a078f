"""Rows of large tables fetched by id: dot products, weighted sums, and the gradient of a table. No fetched row outlives
its chunk, and every sum runs in a fixed order. `native.table_rows` has the same on compiled kernels, and
`ops.row_operations` chooses."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from moestro.ops.row_gradients import DEVICE_CHUNK

# Rows gathered at a time: small enough to stay in a core's cache, large enough to amortise the calls.
_ROWS = 1024


def dots(
    table: Shaped[Tensor, "e d"],
    ids: Int[Tensor, "t k"],
    x: Float[Tensor, "t d"],
    scale: Float[Tensor, "e"] | None = None,
) -> Float[Tensor, "t k"]:
    """out_tk = scale[ids_tk] * table[ids_tk] . x_t; without a scale it is 1."""
    t, k = ids.shape
    d = x.shape[1]
    out = x.new_empty(t, k)
    step = max(1, _at_once(x) // max(k, 1))
    buffer = x.new_empty(min(step, t) * k, d)
    for a in range(0, t, step):
        b = min(a + step, t)
        rows = buffer[: (b - a) * k]
        _read(table, ids[a:b].reshape(-1), rows)
        torch.bmm(rows.view(b - a, k, d), x[a:b, :, None], out=out[a:b, :, None])
    return out if scale is None else out * scale[ids]


def weighted_rows(
    table: Shaped[Tensor, "e d"],
    ids: Int[Tensor, "t k"],
    coefficient: Float[Tensor, "t k"],
    scale: Float[Tensor, "e"] | None = None,
) -> Float[Tensor, "t d"]:
    """out_t = sum_k coefficient_tk * scale[ids_tk] * table[ids_tk]; without a scale it is 1."""
    if scale is not None:
        coefficient = coefficient * scale[ids]
    if ids.numel() == 0:
        return coefficient.new_zeros(len(ids), table.shape[1])
    if table.dtype != coefficient.dtype:
        starts = torch.arange(0, ids.numel(), ids.shape[1], device=ids.device)
        return _sums_widened(table, ids.flatten(), coefficient.flatten(), starts)
    return F.embedding_bag(ids, table, per_sample_weights=coefficient.contiguous(), mode="sum")


def ragged_dots(
    table: Float[Tensor, "e d"], ids: Int[Tensor, "n"], x: Float[Tensor, "t d"], token: Int[Tensor, "n"]
) -> Float[Tensor, "n"]:
    """out_j = table[ids_j] . x[token_j]."""
    out = x.new_empty(len(ids))
    step = _at_once(x)
    rows, inputs = x.new_empty(2, min(step, len(ids)), x.shape[1])
    for a in range(0, len(ids), step):
        b = min(a + step, len(ids))
        _read(table, ids[a:b], rows[: b - a])
        torch.index_select(x, 0, token[a:b], out=inputs[: b - a])
        torch.bmm(rows[: b - a, None], inputs[: b - a, :, None], out=out[a:b, None, None])
    return out


def ragged_sums(
    table: Float[Tensor, "e d"], ids: Int[Tensor, "n"], coefficient: Float[Tensor, "n"], starts: Int[Tensor, "t"]
) -> Float[Tensor, "t d"]:
    """out_t = sum of coefficient_j * table[ids_j] over the places j from starts_t up to those of t + 1."""
    if ids.numel() == 0:
        return coefficient.new_zeros(len(starts), table.shape[1])
    if table.dtype != coefficient.dtype:
        return _sums_widened(table, ids, coefficient, starts)
    return F.embedding_bag(ids, table, starts, per_sample_weights=coefficient, mode="sum")


def _sums_widened(table: Tensor, ids: Tensor, coefficient: Tensor, starts: Tensor) -> Tensor:
    """The same for a table narrower than the arithmetic."""
    out = coefficient.new_empty(len(starts), table.shape[1])
    ends = [*starts.tolist(), len(ids)]
    step = max(1, _at_once(out) * len(starts) // len(ids))
    for a in range(0, len(starts), step):
        b = min(a + step, len(starts))
        places = slice(ends[a], ends[b])
        rows = coefficient.new_empty(ends[b] - ends[a], table.shape[1])
        _read(table, ids[places], rows)
        each = torch.arange(len(rows), device=rows.device)
        weights = coefficient[places]
        out[a:b] = F.embedding_bag(each, rows, starts[a:b] - ends[a], per_sample_weights=weights, mode="sum")
    return out


def _at_once(x: Tensor) -> int:
    """How many rows as long as those of `x` are gathered at a time: elsewhere than on a CPU calls cost, not caches."""
    return _ROWS if x.device.type == "cpu" else max(1, DEVICE_CHUNK // max(1, x.shape[1]))


def _read(table: Tensor, ids: Tensor, out: Tensor) -> None:
    """Rows of a table, widened to the dtype of `out` where they are narrower."""
    if table.dtype == out.dtype:
        torch.index_select(table, 0, ids, out=out)
    else:
        out.copy_(table.index_select(0, ids))


class Segments:
    """The places of `ids` in the order of the ids (`order`), and where each row's begin: of every row of the table, or
    with `sparse` of those that are met (`rows`)."""

    def __init__(self, ids: Int[Tensor, "n"], n_rows: int, sparse: bool) -> None:
        self.n_rows = n_rows
        sorted_ids, self.order = ids.sort(stable=True)
        if sparse:
            self.rows, count = sorted_ids.unique_consecutive(return_counts=True)
            self.starts = count.cumsum(0) - count
        else:
            # by search, because bincount makes the host wait for the device
            self.rows = None
            self.starts = torch.searchsorted(sorted_ids, torch.arange(n_rows, device=ids.device))

    def table_gradient(
        self, source: Float[Tensor, "t d"], token: Int[Tensor, "n"], coefficient: Float[Tensor, "n"]
    ) -> Tensor:
        """Row e = sum over the places j of id e of coefficient_j * source[token_j], [n_rows, d]; rows that are not met
        have zeros, or with `sparse` are absent (`torch.sparse_coo`, coalesced). `token` is in the order of the ids
        (`token_of[order]`), `coefficient` is not."""
        values = self._sums(source, token, coefficient)
        if self.rows is None:
            return values
        shape = (self.n_rows, source.shape[1])
        return torch.sparse_coo_tensor(self.rows[None], values, shape, is_coalesced=True, check_invariants=False)

    def _sums(self, source: Tensor, token: Tensor, coefficient: Tensor) -> Tensor:
        if not len(self.order):
            return source.new_zeros(len(self.starts), source.shape[1])
        weights = coefficient[self.order]
        return F.embedding_bag(token, source.contiguous(), self.starts, per_sample_weights=weights, mode="sum")

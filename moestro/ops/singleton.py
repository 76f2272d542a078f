"""One-neuron experts fetched by id, for a million of them: no gathered row outlives its chunk."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from moestro.ops import backend, reference
from moestro.ops.activations import activation as find
from moestro.ops.precision import compute_dtype, without_autocast

# Rows gathered at a time: small enough to stay in a core's cache, large enough to amortise the calls.
_ROWS = 1024


def singleton_experts(
    x: Float[Tensor, "t d"],
    ids: Int[Tensor, "t k"],
    weight: Float[Tensor, "t k"],
    up: Float[Tensor, "e d"],
    down: Float[Tensor, "e d"],
    activation: str,
    sparse_gradients: bool = False,
) -> Float[Tensor, "t d"]:
    """y_t = sum_k weight_tk * act(up[ids_tk] . x_t) * down[ids_tk]  (He 2024, arXiv:2407.04153, Alg. 1).

    Never materialises [t, k, d]: dot products run on chunks of gathered rows, weighted sums as embedding bags, table
    gradients by sorting the ids and summing segments, so they are deterministic. Saves x and [t, k] numbers only.

    With `sparse_gradients` the gradients of `up` and `down` are coalesced `torch.sparse_coo` tensors: the u ids met,
    ascending, and their [u, d] values. Nothing of size e * d is then allocated, not even a table in autocast's dtype:
    arithmetic runs in the dtype of the tables, on an x rounded, and to an output rounded, as without it.
    """
    outside = compute_dtype(x)
    inside = up.dtype if sparse_gradients else outside
    x, weight, up, down = (v.to(inside) for v in (x.to(outside), weight, up, down))
    with without_autocast(x):
        if backend.active() == "reference":
            y = reference.singleton_experts(x, ids, weight, up, down, activation, sparse_gradients)
        else:
            y = _fused(x, ids, weight, up, down, activation, sparse_gradients)  # type: ignore[call-arg]
    return y.to(outside)


@torch.compiler.disable
def _fused(x: Tensor, ids: Tensor, weight: Tensor, up: Tensor, down: Tensor, activation: str, sparse: bool) -> Tensor:
    return _Singletons.apply(x, ids, weight, up, down, activation, sparse)  # type: ignore


class _Singletons(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ids, weight, up, down, activation, sparse):  # type: ignore[override]
        z = _dots(up, ids, x)
        hidden = find(activation).forward(z)
        ctx.save_for_backward(x, ids, weight, up, down, z)
        ctx.activation, ctx.sparse = activation, sparse
        return _weighted_rows(down, ids, hidden * weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[override]
        x, ids, weight, up, down, z = ctx.saved_tensors
        act = find(ctx.activation)
        hidden = act.forward(z)
        along = _dots(down, ids, dy.contiguous())
        dz = act.backward(along * weight, z)
        segments = _Segments(ids, len(up), ctx.sparse)
        return (
            _weighted_rows(up, ids, dz),
            None,
            along * hidden,
            segments.table_gradient(x, dz),
            segments.table_gradient(dy, hidden * weight),
            None,
            None,
        )


def _dots(table: Tensor, ids: Tensor, x: Tensor) -> Tensor:
    """out_tk = table[ids_tk] . x_t."""
    t, k = ids.shape
    d = x.shape[1]
    out = x.new_empty(t, k)
    step = max(1, _ROWS // max(k, 1))
    buffer = x.new_empty(step * k, d)
    for a in range(0, t, step):
        b = min(a + step, t)
        rows = buffer[: (b - a) * k]
        torch.index_select(table, 0, ids[a:b].reshape(-1), out=rows)
        torch.bmm(rows.view(b - a, k, d), x[a:b, :, None], out=out[a:b, :, None])
    return out


def _weighted_rows(table: Tensor, ids: Tensor, coefficient: Tensor) -> Tensor:
    """out_t = sum_k coefficient_tk * table[ids_tk]."""
    if ids.numel() == 0:
        return table.new_zeros(len(ids), table.shape[1])
    return F.embedding_bag(ids, table, per_sample_weights=coefficient.contiguous(), mode="sum")


class _Segments:
    """The (token, slot) pairs in id order, and where each expert's begin: of every expert, or with `sparse` of those
    that have any (`rows`)."""

    def __init__(self, ids: Tensor, n_experts: int, sparse: bool) -> None:
        self.n_experts, self.per_token = n_experts, ids.shape[1]
        sorted_ids, self.order = ids.flatten().sort(stable=True)
        if sparse:
            self.rows, count = sorted_ids.unique_consecutive(return_counts=True)
        else:
            self.rows, count = None, torch.bincount(sorted_ids, minlength=n_experts)
        self.starts = count.cumsum(0) - count

    def table_gradient(self, source: Tensor, coefficient: Tensor) -> Tensor:
        """Row e = sum over the pairs (t, k) of expert e of coefficient_tk * source_t; idle experts have zeros, or with
        `sparse` no row."""
        values = self._sums(source, coefficient)
        if self.rows is None:
            return values
        shape = (self.n_experts, source.shape[1])
        return torch.sparse_coo_tensor(self.rows[None], values, shape, is_coalesced=True, check_invariants=False)

    def _sums(self, source: Tensor, coefficient: Tensor) -> Tensor:
        if not len(self.order):
            return source.new_zeros(len(self.starts), source.shape[1])
        pairs = coefficient.flatten()[self.order]
        token = self.order // self.per_token
        return F.embedding_bag(token, source.contiguous(), self.starts, per_sample_weights=pairs, mode="sum")

"""One-neuron experts fetched by id, for a million of them: no gathered row outlives its chunk."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from moestro.ops import backend, reference
from moestro.ops.activations import activation as find
from moestro.ops.precision import compute_dtype

# Rows gathered at a time: small enough to stay in a core's cache, large enough to amortise the calls.
_ROWS = 1024


def singleton_experts(
    x: Float[Tensor, "t d"],
    ids: Int[Tensor, "t k"],
    weight: Float[Tensor, "t k"],
    up: Float[Tensor, "e d"],
    down: Float[Tensor, "e d"],
    activation: str,
) -> Float[Tensor, "t d"]:
    """y_t = sum_k weight_tk * act(up[ids_tk] . x_t) * down[ids_tk]  (He 2024, arXiv:2407.04153, Alg. 1).

    Never materialises [t, k, d]: dot products run on chunks of gathered rows, weighted sums as embedding bags, table
    gradients by sorting the ids and summing segments, so they are deterministic. Saves x and [t, k] numbers only.
    """
    dtype = compute_dtype(x)
    x, weight, up, down = (v.to(dtype) for v in (x, weight, up, down))
    if backend.active() == "reference":
        return reference.singleton_experts(x, ids, weight, up, down, activation)
    return _fused(x, ids, weight, up, down, activation)  # type: ignore[call-arg]


@torch.compiler.disable
def _fused(x: Tensor, ids: Tensor, weight: Tensor, up: Tensor, down: Tensor, activation: str) -> Tensor:
    return _Singletons.apply(x, ids, weight, up, down, activation)  # type: ignore


class _Singletons(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ids, weight, up, down, activation):  # type: ignore[override]
        z = _dots(up, ids, x)
        hidden = find(activation).forward(z)
        ctx.save_for_backward(x, ids, weight, up, down, z)
        ctx.activation = activation
        return _weighted_rows(down, ids, hidden * weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[override]
        x, ids, weight, up, down, z = ctx.saved_tensors
        act = find(ctx.activation)
        hidden = act.forward(z)
        along = _dots(down, ids, dy.contiguous())
        dz = act.backward(along * weight, z)
        segments = _Segments(ids, len(up))
        return (
            _weighted_rows(up, ids, dz),
            None,
            along * hidden,
            segments.table_gradient(x, dz),
            segments.table_gradient(dy, hidden * weight),
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
    """The (token, slot) pairs in id order, and where each expert's begin."""

    def __init__(self, ids: Tensor, n_experts: int) -> None:
        self.per_token = ids.shape[1]
        flat = ids.flatten()
        self.order = flat.argsort(stable=True)
        count = torch.bincount(flat, minlength=n_experts)
        self.starts = count.cumsum(0) - count

    def table_gradient(self, source: Tensor, coefficient: Tensor) -> Tensor:
        """Row e = sum over the pairs (t, k) of expert e of coefficient_tk * source_t; zero for idle experts."""
        if not len(self.order):
            return source.new_zeros(len(self.starts), source.shape[1])
        pairs = coefficient.flatten()[self.order]
        token = self.order // self.per_token
        return F.embedding_bag(token, source.contiguous(), self.starts, per_sample_weights=pairs, mode="sum")

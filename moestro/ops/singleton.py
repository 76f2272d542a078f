"""One-neuron experts fetched by id, for a million of them: no gathered row outlives its chunk."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from moestro.ops import backend, reference
from moestro.ops.activations import activation as find
from moestro.ops.precision import compute_dtype, without_autocast
from moestro.ops.table_rows import Segments, dots, weighted_rows


def singleton_experts(
    x: Float[Tensor, "t d"],
    ids: Int[Tensor, "t k"],
    weight: Float[Tensor, "t k"],
    up: Float[Tensor, "e d"],
    down: Float[Tensor, "e d"],
    activation: str,
    sparse_gradients: bool = False,
    gate: Float[Tensor, "e d"] | None = None,
) -> Float[Tensor, "t d"]:
    """y_t = sum_k weight_tk * act(up[ids_tk] . x_t) * down[ids_tk]  (He 2024, arXiv:2407.04153, Alg. 1); with a third
    table, the gated unit that the paper suggests: act(gate[ids_tk] . x_t) * (up[ids_tk] . x_t) in place of act(...).

    Never materialises [t, k, d]: dot products run on chunks of gathered rows, weighted sums as embedding bags, table
    gradients by sorting the ids and summing segments, so they are deterministic. Saves x and [t, k] numbers only.

    With `sparse_gradients` the gradients of the tables are coalesced `torch.sparse_coo` tensors: the u ids met,
    ascending, and their [u, d] values. Nothing of size e * d is then allocated, not even a table in autocast's dtype:
    arithmetic runs in the dtype of the tables, on an x rounded, and to an output rounded, as without it.
    """
    outside = compute_dtype(x)
    inside = up.dtype if sparse_gradients else outside
    x, weight, up, down = (v.to(inside) for v in (x.to(outside), weight, up, down))
    gate = None if gate is None else gate.to(inside)
    with without_autocast(x):
        if backend.active() == "reference":
            y = reference.singleton_experts(x, ids, weight, up, down, activation, sparse_gradients, gate)
        else:
            y = _fused(x, ids, weight, up, down, activation, sparse_gradients, gate)  # type: ignore[call-arg]
    return y.to(outside)


def value_rows(
    ids: Int[Tensor, "t k"],
    weight: Float[Tensor, "t k"],
    values: Float[Tensor, "e d"],
    sparse_gradients: bool = False,
) -> Float[Tensor, "t d"]:
    """y_t = sum_k weight_tk * values[ids_tk]: a product-key memory's reading (Lample 2019, arXiv:1907.05242, Eq. 2).

    Memory, dtypes and gradients as in `singleton_experts`; the dtype outside is autocast's, else that of `values`.
    """
    outside = compute_dtype(values)
    inside = values.dtype if sparse_gradients else outside
    weight, values = weight.to(inside), values.to(inside)
    with without_autocast(values):
        if backend.active() == "reference":
            y = reference.value_rows(ids, weight, values, sparse_gradients)
        else:
            y = _fused_values(ids, weight, values, sparse_gradients)  # type: ignore[call-arg]
    return y.to(outside)


@torch.compiler.disable
def _fused(
    x: Tensor,
    ids: Tensor,
    weight: Tensor,
    up: Tensor,
    down: Tensor,
    activation: str,
    sparse: bool,
    gate: Tensor | None,
) -> Tensor:
    if gate is None:
        return _Singletons.apply(x, ids, weight, up, down, activation, sparse)  # type: ignore
    return _GatedSingletons.apply(x, ids, weight, gate, up, down, activation, sparse)  # type: ignore


@torch.compiler.disable
def _fused_values(ids: Tensor, weight: Tensor, values: Tensor, sparse: bool) -> Tensor:
    return _Values.apply(ids, weight, values, sparse)  # type: ignore


class _Singletons(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ids, weight, up, down, activation, sparse):  # type: ignore[override]
        z = dots(up, ids, x)
        hidden = find(activation).forward(z)
        ctx.save_for_backward(x, ids, weight, up, down, z)
        ctx.activation, ctx.sparse = activation, sparse
        return weighted_rows(down, ids, hidden * weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[override]
        x, ids, weight, up, down, z = ctx.saved_tensors
        act = find(ctx.activation)
        hidden = act.forward(z)
        along = dots(down, ids, dy.contiguous())
        dz = act.backward(along * weight, z)
        pairs = _Pairs(ids, len(up), ctx.sparse)
        return (
            weighted_rows(up, ids, dz),
            None,
            along * hidden,
            pairs.table_gradient(x, dz),
            pairs.table_gradient(dy, hidden * weight),
            None,
            None,
        )


class _GatedSingletons(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ids, weight, gate, up, down, activation, sparse):  # type: ignore[override]
        z, linear = dots(gate, ids, x), dots(up, ids, x)
        ctx.save_for_backward(x, ids, weight, gate, up, down, z, linear)
        ctx.activation, ctx.sparse = activation, sparse
        return weighted_rows(down, ids, find(activation).forward(z) * linear * weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[override]
        x, ids, weight, gate, up, down, z, linear = ctx.saved_tensors
        act = find(ctx.activation)
        opened = act.forward(z)
        along = dots(down, ids, dy.contiguous())
        dhidden = along * weight
        dz, dlinear = act.backward(dhidden * linear, z), dhidden * opened
        pairs = _Pairs(ids, len(up), ctx.sparse)
        return (
            weighted_rows(gate, ids, dz) + weighted_rows(up, ids, dlinear),
            None,
            along * opened * linear,
            pairs.table_gradient(x, dz),
            pairs.table_gradient(x, dlinear),
            pairs.table_gradient(dy, opened * linear * weight),
            None,
            None,
        )


class _Values(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, weight, values, sparse):  # type: ignore[override]
        ctx.save_for_backward(ids, weight, values)
        ctx.sparse = sparse
        return weighted_rows(values, ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[override]
        ids, weight, values = ctx.saved_tensors
        pairs = _Pairs(ids, len(values), ctx.sparse)
        return None, dots(values, ids, dy.contiguous()), pairs.table_gradient(dy, weight), None


class _Pairs:
    """The (token, slot) pairs of `ids` in the order of the ids."""

    def __init__(self, ids: Tensor, n_rows: int, sparse: bool) -> None:
        self.segments = Segments(ids.flatten(), n_rows, sparse)
        self.token = self.segments.order // max(1, ids.shape[1])

    def table_gradient(self, source: Tensor, coefficient: Tensor) -> Tensor:
        """Row e = sum over the pairs (t, k) of expert e of coefficient_tk * source_t."""
        return self.segments.table_gradient(source, self.token, coefficient.flatten())

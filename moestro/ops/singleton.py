"""One-neuron experts fetched by id, for a million of them: no gathered row outlives its chunk."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from moestro.ops import backend, reference, triton_peer
from moestro.ops.activations import activation as find
from moestro.ops.ffn import wants_gradient
from moestro.ops.precision import compute_dtype, without_autocast
from moestro.ops.row_gradients import TableGradients
from moestro.ops.row_operations import RowOperations, row_dtypes, row_operations


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
    arithmetic runs in the dtype of the tables (in float32 where they are narrower: rows are widened as they are read),
    on an x rounded, and to an output rounded, as without it. Native and Triton's kernels never copy a table: they read
    it in its own dtype and compute in float32. Tables whose factors are collected (`ops.row_gradients`) get
    those instead of a gradient.
    """
    outside = compute_dtype(x)
    rows = row_operations(x, weight, up, down)
    inside, stored = row_dtypes(rows.widens or backend.active() == "triton", up, outside, sparse_gradients)
    x, weight, up, down = x.to(outside), weight.to(inside), up.to(stored), down.to(stored)
    gate = None if gate is None else gate.to(stored)
    if backend.active() != "triton" or wants_gradient(x, weight, up, down, *(() if gate is None else (gate,))):
        # else the kernel widens what it reads and rounds what it writes, and the table's gradient is none
        x = x.to(inside)
    with without_autocast(x):
        if backend.active() == "reference":
            y = reference.singleton_experts(x, ids, weight, up, down, activation, sparse_gradients, gate)
        elif backend.active() == "triton":
            y = triton_peer.singleton_experts(x, ids, weight, up, down, activation, sparse_gradients, gate)
        else:
            y = _fused(x, ids, weight, up, down, activation, sparse_gradients, gate, rows)  # type: ignore
    return y.to(outside)


def value_rows(
    ids: Int[Tensor, "t k"],
    weight: Float[Tensor, "t k"],
    values: Float[Tensor, "e d"],
    sparse_gradients: bool = False,
) -> Float[Tensor, "t d"]:
    """y_t = sum_k weight_tk * values[ids_tk]: a product-key memory's reading (Lample 2019, arXiv:1907.05242).

    Memory, dtypes and gradients as in `singleton_experts`; the dtype outside is autocast's, else that of `values`.
    """
    outside = compute_dtype(values)
    rows = row_operations(weight, values)
    inside, stored = row_dtypes(rows.widens or backend.active() == "triton", values, outside, sparse_gradients)
    weight, values = weight.to(inside), values.to(stored)
    with without_autocast(values):
        if backend.active() == "reference":
            y = reference.value_rows(ids, weight, values, sparse_gradients)
        elif backend.active() == "triton":
            y = triton_peer.value_rows(ids, weight, values, sparse_gradients)
        else:
            y = _fused_values(ids, weight, values, sparse_gradients, rows)  # type: ignore
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
    rows: RowOperations,
) -> Tensor:
    if gate is None:
        return _Singletons.apply(x, ids, weight, up, down, activation, sparse, rows)  # type: ignore
    return _GatedSingletons.apply(x, ids, weight, gate, up, down, activation, sparse, rows)  # type: ignore


@torch.compiler.disable
def _fused_values(ids: Tensor, weight: Tensor, values: Tensor, sparse: bool, rows: RowOperations) -> Tensor:
    return _Values.apply(ids, weight, values, sparse, rows)  # type: ignore


class _Singletons(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ids, weight, up, down, activation, sparse, rows):  # type: ignore[override]
        z = rows.dots(up, ids, x)
        hidden = find(activation).forward(z)
        ctx.save_for_backward(x, ids, weight, up, down, z)
        ctx.activation, ctx.sparse, ctx.rows = activation, sparse, rows
        ctx.gradients = TableGradients({3: up, 4: down})
        return rows.weighted_rows(down, ids, hidden * weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[override]
        x, ids, weight, up, down, z = ctx.saved_tensors
        act, rows = find(ctx.activation), ctx.rows
        hidden = act.forward(z)
        along = rows.dots(down, ids, dy.contiguous())
        dz = act.backward(along * weight, z)
        return (
            rows.weighted_rows(up, ids, dz) if ctx.needs_input_grad[0] else None,
            None,
            along * hidden,
            *_tables(ctx, ids, len(up), {3: (x, dz), 4: (dy, hidden * weight)}),
            None,
            None,
            None,
        )


class _GatedSingletons(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ids, weight, gate, up, down, activation, sparse, rows):  # type: ignore[override]
        z, linear = rows.dots(gate, ids, x), rows.dots(up, ids, x)
        ctx.save_for_backward(x, ids, weight, gate, up, down, z, linear)
        ctx.activation, ctx.sparse, ctx.rows = activation, sparse, rows
        ctx.gradients = TableGradients({3: gate, 4: up, 5: down})
        return rows.weighted_rows(down, ids, find(activation).forward(z) * linear * weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[override]
        x, ids, weight, gate, up, down, z, linear = ctx.saved_tensors
        act, rows = find(ctx.activation), ctx.rows
        opened = act.forward(z)
        along = rows.dots(down, ids, dy.contiguous())
        dhidden = along * weight
        dz, dlinear = act.backward(dhidden * linear, z), dhidden * opened
        wanted = ctx.needs_input_grad[0]
        return (
            rows.weighted_rows(gate, ids, dz) + rows.weighted_rows(up, ids, dlinear) if wanted else None,
            None,
            along * opened * linear,
            *_tables(ctx, ids, len(up), {3: (x, dz), 4: (x, dlinear), 5: (dy, opened * linear * weight)}),
            None,
            None,
            None,
        )


class _Values(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, weight, values, sparse, rows):  # type: ignore[override]
        ctx.save_for_backward(ids, weight, values)
        ctx.sparse, ctx.rows = sparse, rows
        ctx.gradients = TableGradients({2: values})
        return rows.weighted_rows(values, ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[override]
        ids, weight, values = ctx.saved_tensors
        along = ctx.rows.dots(values, ids, dy.contiguous())
        return None, along, *_tables(ctx, ids, len(values), {2: (dy, weight)}), None, None


def _tables(ctx, ids: Tensor, n_rows: int, factors: dict[int, tuple[Tensor, Tensor]]) -> list[Tensor | None]:
    """Gradients of the tables at these places: row e is the sum over the pairs (t, k) of expert e of coefficient_tk *
    source_t."""
    return ctx.gradients.of(
        ctx.needs_input_grad,
        lambda: ctx.rows.segments(ids.flatten(), n_rows, ctx.sparse),
        lambda order: order // max(1, ids.shape[1]),
        factors,
    )

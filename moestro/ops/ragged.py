"""Experts of a few neurons each, of any widths, fetched by id: an expert is as many one-neuron rows with one gate."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from moestro.ops import backend, reference
from moestro.ops.activations import activation as find
from moestro.ops.met_rows import Met
from moestro.ops.precision import compute_dtype, without_autocast
from moestro.ops.row_gradients import TableGradients
from moestro.ops.row_operations import RowOperations, row_dtypes, row_operations


def ragged_experts(
    x: Float[Tensor, "t d"],
    ids: Int[Tensor, "t k"],
    weight: Float[Tensor, "t k"],
    starts: Int[Tensor, "e1"],
    up: Float[Tensor, "n d"],
    down: Float[Tensor, "n d"],
    activation: str,
    sparse_gradients: bool = False,
) -> Float[Tensor, "t d"]:
    """y_t = sum_k weight_tk * sum_j act(up_j . x_t) * down_j over the neurons j of expert e = ids_tk, which own the
    rows starts[e], ..., starts[e + 1] - 1 of both tables.

    An expert of w neurons is w experts of one neuron with the same gate, so each pair (t, k) becomes w rows of the
    operation that PEER has, without a loop over experts and without padding: time and memory are those of the neurons
    met. Saves x and one number a neuron met. Dtypes and `sparse_gradients` as in `singleton_experts`.
    """
    outside = compute_dtype(x)
    rows = row_operations(x, weight, up, down)
    inside, stored = row_dtypes(rows.widens, up, outside, sparse_gradients)
    x, weight, up, down = x.to(outside).to(inside), weight.to(inside), up.to(stored), down.to(stored)
    with without_autocast(x):
        if backend.active() == "reference":
            y = reference.ragged_experts(x, ids, weight, starts, up, down, activation, sparse_gradients)
        else:
            y = _fused(x, ids, weight, starts, up, down, activation, sparse_gradients, rows)  # type: ignore[call-arg]
    return y.to(outside)


class Neurons:
    """The neurons that the pairs (t, k) of `ids` meet, pair after pair: the row of each, its pair and its token; how
    many a pair has (`width`) and where each token's begin (`starts`)."""

    def __init__(self, ids: Tensor, starts: Tensor) -> None:
        first = starts[ids.flatten()]
        self.width = starts[ids.flatten() + 1] - first
        before = self.width.cumsum(0) - self.width
        self.pair = torch.arange(len(first), device=ids.device).repeat_interleave(self.width)
        self.row = torch.arange(len(self.pair), device=ids.device) + (first - before)[self.pair]
        self.token = self.pair // max(1, ids.shape[1])
        self.starts = before.view(ids.shape)[:, 0] if ids.numel() else before.new_zeros(len(ids))


def neurons_met(met: Met, starts: Int[Tensor, "e1"]) -> tuple[Met, Int[Tensor, "m"]]:
    """The neurons that tokens meet who meet these experts (`met.row`), expert after expert, and the place of each one's
    expert in `met`."""
    each = Neurons(met.row[:, None], starts)
    return Met(met.token[each.pair], each.row, met.n_tokens), each.pair


@torch.compiler.disable
def _fused(
    x: Tensor,
    ids: Tensor,
    weight: Tensor,
    starts: Tensor,
    up: Tensor,
    down: Tensor,
    activation: str,
    sparse: bool,
    rows: RowOperations,
) -> Tensor:
    return _Ragged.apply(x, ids, weight, starts, up, down, activation, sparse, rows)  # type: ignore


class _Ragged(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ids, weight, starts, up, down, activation, sparse, rows):  # type: ignore[override]
        met = Neurons(ids, starts)
        z = rows.ragged_dots(up, met.row, x, met.token)
        ctx.save_for_backward(x, ids, weight, starts, up, down, z)
        ctx.activation, ctx.sparse, ctx.rows = activation, sparse, rows
        ctx.gradients = TableGradients({4: up, 5: down})
        gates = weight.flatten()[met.pair]
        return rows.ragged_sums(down, met.row, find(activation).forward(z) * gates, met.starts)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[override]
        x, ids, weight, starts, up, down, z = ctx.saved_tensors
        act, met, rows = find(ctx.activation), Neurons(ids, starts), ctx.rows
        hidden, gates = act.forward(z), weight.flatten()[met.pair]
        along = rows.ragged_dots(down, met.row, dy.contiguous(), met.token)
        dz = act.backward(along * gates, z)
        tables = ctx.gradients.of(
            ctx.needs_input_grad,
            lambda: rows.segments(met.row, len(up), ctx.sparse),
            lambda order: met.token[order],
            {4: (x, dz), 5: (dy, hidden * gates)},
        )
        return (
            rows.ragged_sums(up, met.row, dz, met.starts),
            None,
            torch.segment_reduce(along * hidden, "sum", lengths=met.width, unsafe=True).view_as(weight),
            None,
            *tables,
            None,
            None,
            None,
        )

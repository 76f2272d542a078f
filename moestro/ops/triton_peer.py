"""PEER in Triton: `ops.singleton_experts`, `ops.value_rows` and `ops.product_key_topk` on the kernels of
`triton_peer_*`, with their gradients. Nothing of [tokens, heads, k, d] or [tokens, heads, 2, n] is ever written, no sum
is atomic: two runs agree to the bit.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from moestro.ops.activations import activation as find
from moestro.ops.row_gradients import TableGradients, factored
from moestro.ops.table_rows import Segments
from moestro.ops.triton_ffn import require_device, require_dtype

if TYPE_CHECKING:
    from moestro.ops.quantized import QuantizedTable


class TritonSegments(Segments):
    """Sums of segments by the kernel, long ones in parts; a table's gradient is written once and never zeroed."""

    def _sums(self, source: Tensor, token: Tensor, coefficient: Tensor) -> Tensor:
        from moestro.ops.triton_peer_rows import segment_sums

        return segment_sums(self.order, self.starts, source.contiguous(), token, coefficient.contiguous())


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
    """`ops.singleton_experts` on CUDA tensors, or on CPU tensors under Triton's interpreter: one kernel forward, one
    for the gradients of x and the gates, and two for those of each table. Sums are in float32; saves x and one or,
    gated, two float32 numbers a row.

    Raises: ValueError for an unknown activation, and for a dtype or device that the kernels cannot take; ImportError
    where Triton is missing.
    """
    find(activation)
    require_kernels(x, weight, up, down)
    return _experts(x, ids, weight, gate, up, down, activation, sparse_gradients)  # type: ignore[call-arg]


def quantized_singletons(
    x: Float[Tensor, "t d"],
    ids: Int[Tensor, "t k"],
    weight: Float[Tensor, "t k"],
    tables: "Sequence[QuantizedTable]",
    activation: str,
) -> Float[Tensor, "t d"]:
    """`ops.quantized.quantized_singletons`, as `singleton_experts`, of tables (up, down) or (gate, up, down).

    Raises: as `singleton_experts`.
    """
    find(activation)
    require_kernels(x, weight, *(table.scale for table in tables))
    return _quantized(x, ids, weight, tables, activation)  # type: ignore[call-arg]


def value_rows(
    ids: Int[Tensor, "t k"],
    weight: Float[Tensor, "t k"],
    values: Float[Tensor, "e d"],
    sparse_gradients: bool = False,
) -> Float[Tensor, "t d"]:
    """`ops.value_rows`, as `singleton_experts`.

    Raises: as `singleton_experts`.
    """
    require_kernels(weight, values)
    return _values(ids, weight, values, sparse_gradients)  # type: ignore[call-arg]


def product_key_topk(
    query: Float[Tensor, "t h c"], keys: Float[Tensor, "2 g n half"], k: int
) -> tuple[Float[Tensor, "t h k"], Int[Tensor, "t h k"]]:
    """`ops.product_key_topk` in two kernels: the k best keys of each side, scores of a tile of keys in registers; then
    the k best pairs of the staircase. Computed in float32 (three TF32 products each on tensor cores); equal scores are
    in the order of the definition. The gradient goes through the chosen scores only.

    Raises: as `singleton_experts`.
    """
    require_kernels(query, keys)
    scores, ids = _topk(query.float(), keys.float(), k)  # type: ignore[call-arg]
    return scores.to(query.dtype), ids


def require_kernels(*tensors: Tensor) -> None:
    """Raises: as `singleton_experts`, where the kernels cannot take these."""
    for tensor in tensors:
        require_dtype(tensor)
        require_device(tensor)


@torch.compiler.disable
def _experts(
    x: Tensor, ids: Tensor, weight: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, activation: str, sparse: bool
) -> Tensor:
    return _Experts.apply(x, ids, weight, gate, up, down, activation, sparse)  # type: ignore[return-value]


@torch.compiler.disable
def _quantized(x: Tensor, ids: Tensor, weight: Tensor, tables: "Sequence[QuantizedTable]", activation: str) -> Tensor:
    return _QuantizedExperts.apply(x, ids, weight, tables, activation)  # type: ignore[return-value]


@torch.compiler.disable
def _values(ids: Tensor, weight: Tensor, values: Tensor, sparse: bool) -> Tensor:
    return _Values.apply(ids, weight, values, sparse)  # type: ignore[return-value]


@torch.compiler.disable
def _topk(query: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return _TopK.apply(query, keys, k)  # type: ignore[return-value]


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ids, weight, gate, up, down, activation, sparse):  # type: ignore[override]
        from moestro.ops import triton_peer_rows as kernels

        x, ids, weight = x.contiguous(), ids.contiguous(), weight.contiguous()
        tables = tuple(table.contiguous() for table in (gate, up, down) if table is not None)
        y, hidden = kernels.forward(x, ids, weight, tables, activation)
        ctx.save_for_backward(x, ids, weight, *hidden, *tables)
        ctx.activation, ctx.sparse = activation, sparse
        ctx.gradients = TableGradients({place: t for place, t in ((3, gate), (4, up), (5, down)) if t is not None})
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[override]
        from moestro.ops import triton_peer_rows as kernels

        x, ids, weight, z, linear, *tables = ctx.saved_tensors
        dy, hidden = dy.contiguous(), kernels.Hidden(z, linear)
        slopes = kernels.backward(dy, ids, weight, tuple(tables), hidden, ctx.activation)
        absent = 3 - len(tables)
        factors = dict(enumerate(_factors(x, dy, slopes, len(tables)), 3 + absent))
        gradients = _table_gradients(ctx, ids, len(tables[-1]), factors)
        return slopes.x, None, slopes.weight, *[None] * absent, *gradients, None, None


class _QuantizedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ids, weight, tables, activation):  # type: ignore[override]
        from moestro.ops import triton_peer_rows as kernels

        x, ids, weight = x.contiguous(), ids.contiguous(), weight.contiguous()
        codes = tuple(bits(table.codes).contiguous() for table in tables)
        scales = tuple(table.scale.contiguous() for table in tables)
        y, hidden = kernels.forward(x, ids, weight, codes, activation, scales)
        ctx.save_for_backward(x, ids, weight, *hidden, *codes, *scales)
        ctx.activation, ctx.pending = activation, [table.pending for table in tables]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[override]
        from moestro.ops import triton_peer_rows as kernels

        x, ids, weight, z, linear, *tables = ctx.saved_tensors
        dy, n = dy.contiguous(), len(ctx.pending)
        codes, scales = tuple(tables[:n]), tuple(tables[n:])
        slopes = kernels.backward(dy, ids, weight, codes, kernels.Hidden(z, linear), ctx.activation, scales)
        if any(pending is not None for pending in ctx.pending):
            segments = TritonSegments(ids.flatten(), len(codes[0]), sparse=True)
            token = segments.order // max(1, ids.shape[1])
            for pending, (source, coefficient) in zip(ctx.pending, _factors(x, dy, slopes, n), strict=True):
                if pending is not None:
                    pending.append(factored(segments, source, token, coefficient.flatten()))
        return slopes.x, None, slopes.weight, None, None


def bits(codes: Tensor) -> Tensor:
    """Codes in 8 bits as kernels read them: float8 as uint8."""
    return codes if codes.dtype == torch.int8 else codes.view(torch.uint8)


def _factors(x: Tensor, dy: Tensor, slopes, n_tables: int) -> list[tuple[Tensor, Tensor]]:
    """(source, coefficient) of the gradient of each table, in the order of (gate, up, down)."""
    middle = [(x, slopes.linear)] if n_tables == 3 else []
    return [(x, slopes.z), *middle, (dy, slopes.coefficient)]


class _Values(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, weight, values, sparse):  # type: ignore[override]
        from moestro.ops import triton_peer_rows as kernels

        ids, weight, values = ids.contiguous(), weight.contiguous(), values.contiguous()
        ctx.save_for_backward(ids, weight, values)
        ctx.sparse, ctx.gradients = sparse, TableGradients({2: values})
        return kernels.forward(weight, ids, weight, (values,), "none")[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[override]
        from moestro.ops import triton_peer_rows as kernels

        ids, weight, values = ctx.saved_tensors
        dy = dy.contiguous()
        slopes = kernels.backward(dy, ids, weight, (values,), kernels.Hidden(weight, weight), "none")
        return None, slopes.weight, *_table_gradients(ctx, ids, len(values), {2: (dy, weight)}), None


def _table_gradients(ctx, ids: Tensor, n_rows: int, factors: dict[int, tuple[Tensor, Tensor]]) -> list[Tensor | None]:
    """Of the tables at these places, as `ops.singleton` has them."""
    return ctx.gradients.of(
        ctx.needs_input_grad,
        lambda: TritonSegments(ids.flatten(), n_rows, ctx.sparse),
        lambda order: order // max(1, ids.shape[1]),
        factors,
    )


class _TopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, keys, k):  # type: ignore[override]
        from moestro.ops.triton_peer_keys import best_pairs

        query, keys = query.contiguous(), keys.contiguous()
        scores, ids, _ = best_pairs(query, keys, k)
        ctx.save_for_backward(query, keys, ids)
        ctx.mark_non_differentiable(ids)
        return scores, ids

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):  # type: ignore[override]
        query, keys, ids = ctx.saved_tensors
        (t, h, k), (_, g, n, half) = ids.shape, keys.shape
        first = torch.arange(h, device=ids.device)[None, :, None] * n if g > 1 else 0
        sides = [(side + first).reshape(t * h, k) for side in (ids // n, ids % n)]
        grad, halves = grad.reshape(t * h, k).contiguous(), query.view(t * h, 2, half)
        dquery, dkeys = [], []
        for side, rows in enumerate(sides):
            dquery.append(_reading(rows, grad, keys[side].reshape(g * n, half)))
            segments = TritonSegments(rows.flatten(), g * n, sparse=False)
            source = halves[:, side].contiguous()
            dkeys.append(segments.table_gradient(source, segments.order // k, grad.flatten()).view(g, n, half))
        return torch.stack(dquery, dim=1).view_as(query), torch.stack(dkeys), None


def _reading(ids: Tensor, weight: Tensor, values: Tensor) -> Tensor:
    """sum_k weight_tk * values[ids_tk], without a gradient."""
    from moestro.ops import triton_peer_rows as kernels

    return kernels.forward(weight, ids, weight, (values,), "none")[0]

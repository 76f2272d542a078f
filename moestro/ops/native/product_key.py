"""Exact top-k over product keys on compiled kernels (`product_key.c`), with its gradient."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from moestro.ops import native

# As in product_key_gradient.c.
COLUMNS = 64
# Tokens of one item, whose keys are packed anew for each.
FEWEST, MOST = 128, 1024


@torch.compiler.disable
def product_key_topk(
    query: Float[Tensor, "t h c"], keys: Float[Tensor, "2 g n half"], k: int
) -> tuple[Float[Tensor, "t h k"], Int[Tensor, "t h k"]]:
    """As `ops.product_key.product_key_topk`, computed in float32; equal scores in the order of the definition.

    Scores of all keys exist for a few tokens of one head at a time. The gradient goes through the chosen scores only:
    k rows for each query and side, added in the order of the tokens.
    """
    scores, ids = _ProductKeyTopK.apply(query.float(), keys.float(), k)  # type: ignore
    return scores.to(query.dtype), ids


class _ProductKeyTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, keys, k):  # type: ignore[override]
        query, keys = query.contiguous(), keys.contiguous()
        t, h, _ = query.shape
        _, g, n, half = keys.shape
        scores, ids = torch.empty(t, h, k), torch.empty(t, h, k, dtype=torch.int64)
        # heads that share their keys are as many tokens of one head
        rows, heads = (t * h, 1) if g == 1 else (t, h)
        part = min(MOST, max(FEWEST, _ceil(rows * heads, native.PARTS * torch.get_num_threads())))
        parts = native.even_parts(heads * _ceil(rows, part))
        native.run("product_key_topk", parts, query, keys, scores, ids, rows, heads, n, half, k, part)
        ctx.save_for_backward(query, keys, ids)
        ctx.mark_non_differentiable(ids)
        return scores, ids

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):  # type: ignore[override]
        query, keys, ids = ctx.saved_tensors
        _, g, _, half = keys.shape
        grad, sizes = grad.contiguous(), (len(ids), ids.shape[1], *keys.shape[1:], ids.shape[2])
        query_grad, keys_grad = torch.empty_like(query), torch.empty_like(keys)
        tokens, columns = native.even_parts(len(ids)), native.even_parts(2 * g * _ceil(half, COLUMNS))
        native.run("product_key_query_gradient", tokens, keys, ids, grad, query_grad, *sizes)
        native.run("product_key_key_gradient", columns, query, ids, grad, keys_grad, *sizes)
        return query_grad, keys_grad, None


def _ceil(number: int, size: int) -> int:
    return -(-number // size)

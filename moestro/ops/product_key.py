"""Exact top-k over n*n product keys from two lists of n scores."""

from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moestro.ops import backend, reference, triton_peer
from moestro.ops.native import product_key as native_product_key

# Scores that plain torch has in memory at a time: few enough for a core's cache; elsewhere enough that kernels are few.
SCORES = 2**20
DEVICE_SCORES = 2**26


def product_key_topk(
    query: Float[Tensor, "t h c"], keys: Float[Tensor, "2 g n half"], k: int
) -> tuple[Float[Tensor, "t h k"], Int[Tensor, "t h k"]]:
    """The k best (score, i*n + j) of each query over all pairs of sub-keys, best first.

    score(i*n + j) = q1 . keys[0, :, i] + q2 . keys[1, :, j] with query = [q1; q2]; g is 1 (keys shared by the heads)
    or h. He 2024, arXiv:2407.04153, section 2.2: the k best pairs lie among the k best of each side. With both
    sides sorted, pair (p, r), counted from one, can be among the k best only if p*r <= k: at k = 16 that leaves 50
    of 256 candidates.

    Equal scores: the definition, native and Triton's kernels put the better left key first, then the better right one,
    equal keys in their order; plain torch, `fused`, keeps no order among equals. None has all scores in memory.

    Raises: ValueError where k > n: then the k best of a side do not exist; for k < 1; for shapes that do not fit.
    """
    _check(query.shape, keys.shape, k)
    if backend.active() == "reference":
        return reference.product_key_topk(query, keys, k)
    if backend.active() == "triton":
        return triton_peer.product_key_topk(query, keys, k)
    if backend.runs_native(query, keys):
        return native_product_key.product_key_topk(query, keys, k)  # type: ignore[call-arg]
    size = SCORES if query.device.type == "cpu" else DEVICE_SCORES
    # a compiler decides what is in memory, and may not know how many tokens there are
    tokens = len(query) if torch.compiler.is_compiling() else max(1, size // (2 * query.shape[1] * keys.shape[2]))
    steps = torch.tensor(staircase(k), device=query.device)
    scores, ids = zip(*(_best_pairs(some, keys, k, steps) for some in query.split(tokens)), strict=True)
    return (scores[0], ids[0]) if len(ids) == 1 else (torch.cat(scores), torch.cat(ids))


def _best_pairs(
    query: Float[Tensor, "t h c"], keys: Float[Tensor, "2 g n half"], k: int, steps: Int[Tensor, "2 p"]
) -> tuple[Float[Tensor, "t h k"], Int[Tensor, "t h k"]]:
    t, h, _ = query.shape
    _, g, n, half = keys.shape
    halves = query.view(t, h, 2, half)
    if g == 1:
        scores = torch.stack([halves[:, :, s] @ keys[s, 0].T for s in (0, 1)], dim=2)
    else:
        scores = torch.einsum("thsc,shnc->thsn", halves, keys)
    best, position = scores.topk(k, dim=-1)
    rows, columns = steps
    candidates = best[:, :, 0, rows] + best[:, :, 1, columns]
    top, pick = candidates.topk(k, dim=-1)
    ids = position[:, :, 0].gather(-1, rows[pick]) * n + position[:, :, 1].gather(-1, columns[pick])
    return top, ids


def _check(query: torch.Size, keys: torch.Size, k: int) -> None:
    """Native kernels trust what they are given."""
    if k > keys[2]:
        raise ValueError(f"top_k={k} > {keys[2]} sub-keys a side, so retrieval would not be exact")
    if k < 1:
        raise ValueError(f"top_k={k}, allowed: at least 1")
    if keys[0] != 2 or keys[1] not in (1, query[1]) or query[2] != 2 * keys[3]:
        raise ValueError(f"keys {list(keys)} for queries {list(query)}, allowed: [2, 1 or heads, n, half a query]")


@lru_cache(maxsize=64)
def staircase(k: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The pairs (p, r), counted from 0, that can be among the k best of both sides: (p + 1)(r + 1) <= k."""
    pairs = [(p, r) for p in range(k) for r in range(k) if (p + 1) * (r + 1) <= k]
    rows, columns = zip(*pairs, strict=True)
    return rows, columns

"""Triton kernels of product-key retrieval: queries of few tokens, the k best keys of a side, and the k best pairs of
both sides' best.

A score and its place travel as one int64 whose order is that of falling scores, equal ones by rising place: the
float32's bits, made monotonic, above the place counted from the end.
"""

from functools import lru_cache
from typing import NamedTuple, no_type_check

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from moestro.ops.few_queries import FeatureNorm
from moestro.ops.product_key import staircase
from moestro.ops.triton_ffn_plan import interpreted, launch, power_of_two

_LOWEST = tl.constexpr(-(2**63))
_PLACES = tl.constexpr(2**32 - 1)
# Features of a query that a program computes, and numbers of their weights that it holds at a time.
_FEATURES, _HELD = 16, 4096
# How gates are made of the k scores of a query.
GATES = {"softmax": 1, "sigmoid": 2, "relu": 3}


class Sizes(NamedTuple):
    """Queries and keys of a tile, numbers of a key multiplied at a time, and queries of a program that pairs."""

    queries: int
    keys: int
    inner: int
    paired: int


def sizes(half: int, k: int) -> Sizes:
    """Sizes by rule."""
    most = power_of_two(max(2, k))
    if interpreted():
        return Sizes(16, max(16, most), 16, 8)
    return Sizes(16, max(128 if k <= 32 else 64, most), min(64, max(16, power_of_two(half))), 4)


class Pairs(NamedTuple):
    """The k best pairs of every query, [t, h, k] each: scores or gates, ids, and, with gates, the token."""

    scores: Tensor
    ids: Tensor
    token: Tensor


def best_pairs(query: Tensor, keys: Tensor, k: int, gate: str | None = None) -> Pairs:
    """Of float32 `query` [t, h, 2 half] and `keys` [2, g, n, half] in any dtype; with `gate` gates take the place of
    scores."""
    (t, h, _), (_, g, n, half) = query.shape, keys.shape
    size, rows, most = sizes(half, k), t * h, power_of_two(max(2, k))
    ids = query.new_empty(t, h, k, dtype=torch.int64)
    found = Pairs(query.new_empty(t, h, k), ids, ids if gate is None else torch.empty_like(ids))
    if not rows:
        return found
    best, place = query.new_empty(rows, 2, k), query.new_empty(rows, 2, k, dtype=torch.int32)
    blocks = -(-(rows // g) // size.queries)
    launch(
        _side_kernel, blocks * g * 2, query, keys, best, place, rows // g, n, g, k, half,
        KP=most, BT=size.queries, BN=size.keys, BH=size.inner,
    )  # fmt: skip
    steps = _staircase(k, query.device)
    launch(
        _pair_kernel, -(-rows // size.paired), best, place, steps, *found, rows, n, h, k, steps.shape[1],
        KP=most, BT=size.paired, BS=max(most, power_of_two(steps.shape[1])), GATE=0 if gate is None else GATES[gate],
    )  # fmt: skip
    return found


def queries(x: Tensor, weight: Tensor, norm: FeatureNorm | None) -> Tensor:
    """x @ weight.T [t, f] in float32, normalised by `norm`; x [t, d] and weight [f, d] are read in their own dtypes,
    the weights once for every token."""
    (t, d), f = x.shape, len(weight)
    out = x.new_empty(t, f, dtype=torch.float32)
    numbers = (out, out, out, out, 0.0) if norm is None else norm
    launch(
        _query_kernel, t * -(-f // _FEATURES), x, weight, *numbers, out, f, d,
        NORM=norm is not None, BF=_FEATURES, BD=min(_HELD // _FEATURES, max(16, power_of_two(d))),
    )  # fmt: skip
    return out


@lru_cache(maxsize=64)
def _staircase(k: int, device: torch.device) -> Tensor:
    """`staircase`, int32 [2, pairs]."""
    with torch.inference_mode(False):
        return torch.tensor(staircase(k), dtype=torch.int32, device=device)


@triton.jit
@no_type_check
def _packed(score, place, n):
    """Scores with their places, as integers of the same order."""
    bits = score.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    return (ordered << 32) | (n - 1 - place).to(tl.int64)


@triton.jit
@no_type_check
def _score_of(packed):
    ordered = (packed >> 32).to(tl.int32)
    return tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(tl.float32, bitcast=True)


@triton.jit
@no_type_check
def _side_kernel(query, keys, best, place, rows, n, g, k, half: tl.constexpr, KP: tl.constexpr, BT: tl.constexpr,
                 BN: tl.constexpr, BH: tl.constexpr):  # fmt: skip
    program = tl.program_id(0)
    side = program % 2
    head = (program // 2) % g
    r = (program // (2 * g)).to(tl.int64) * BT + tl.arange(0, BT)
    row = r * g + head
    found = tl.full((BT, KP), _LOWEST, tl.int64)
    for first in range(0, n, BN):
        i = first + tl.arange(0, BN)
        key = (side * g + head).to(tl.int64) * n + i
        score = tl.zeros((BT, BN), tl.float32)
        for start in tl.static_range(0, half, BH):
            c = start + tl.arange(0, BH)
            q = tl.load(
                query + (row * 2 + side)[:, None] * half + c[None, :],
                mask=(r < rows)[:, None] & (c < half)[None, :], other=0.0,
            )  # fmt: skip
            b = tl.load(keys + key[None, :] * half + c[:, None], mask=(i < n)[None, :] & (c < half)[:, None], other=0.0)
            score = tl.dot(q, b.to(tl.float32), score, input_precision="tf32x3")
        packed = tl.where((i < n)[None, :], _packed(score, i[None, :], n), _LOWEST)
        # most tiles have no key that is better than the worst one found
        if tl.max((tl.max(packed, axis=1) > tl.min(found, axis=1)).to(tl.int32), axis=0) > 0:
            both = tl.join(found, tl.topk(packed, KP))
            found = tl.topk(tl.reshape(both, (BT, 2 * KP)), KP)
    j = tl.arange(0, KP)
    found = tl.sort(found, descending=True)
    at = (row * 2 + side)[:, None] * k + j[None, :]
    there = (r < rows)[:, None] & (j < k)[None, :]
    tl.store(best + at, _score_of(found), mask=there)
    tl.store(place + at, (n - 1 - (found & _PLACES)).to(tl.int32), mask=there)


@triton.jit
@no_type_check
def _pair_kernel(best, place, steps, scores, ids, token, rows, n, h, k, n_steps, KP: tl.constexpr, BT: tl.constexpr,
                 BS: tl.constexpr, GATE: tl.constexpr):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    s = tl.arange(0, BS)
    there = (r < rows)[:, None] & (s < n_steps)[None, :]
    p = tl.load(steps + s, mask=s < n_steps, other=0)
    q = tl.load(steps + n_steps + s, mask=s < n_steps, other=0)
    left = tl.load(best + (r * 2 * k)[:, None] + p[None, :], mask=there, other=0.0)
    right = tl.load(best + (r * 2 * k + k)[:, None] + q[None, :], mask=there, other=0.0)
    packed = tl.where((s < n_steps)[None, :], _packed(left + right, s[None, :], n_steps), _LOWEST)
    found = tl.sort(tl.topk(packed, KP), descending=True)
    j = tl.arange(0, KP)
    there = (r < rows)[:, None] & (j < k)[None, :]
    step = n_steps - 1 - (found & _PLACES)
    p = tl.load(steps + step, mask=there, other=0)
    q = tl.load(steps + n_steps + step, mask=there, other=0)
    i = tl.load(place + (r * 2 * k)[:, None] + p, mask=there, other=0).to(tl.int64)
    i = i * n + tl.load(place + (r * 2 * k + k)[:, None] + q, mask=there, other=0)
    at = r[:, None] * k + j[None, :]
    score = _score_of(found)
    if GATE > 0:
        score = _gates(tl.where(j[None, :] < k, score, -float("inf")), GATE)
        tl.store(token + at, tl.zeros((BT, KP), tl.int64) + (r // h)[:, None], mask=there)
    tl.store(scores + at, score, mask=there)
    tl.store(ids + at, i, mask=there)


@triton.jit
@no_type_check
def _gates(score, GATE: tl.constexpr):
    if GATE == 1:
        gate = tl.exp(score - tl.max(score, axis=1)[:, None])
        gate = gate / tl.sum(gate, axis=1)[:, None]
    elif GATE == 2:
        gate = 1 / (1 + tl.exp(-score))
    else:
        gate = tl.where(score < 0, 0.0, score)
    return gate


@triton.jit
@no_type_check
def _query_kernel(x, weights, centre, variance, gain, shift, eps, out, f, d: tl.constexpr, NORM: tl.constexpr,
                  BF: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    blocks = tl.cdiv(f, BF)
    t = (tl.program_id(0) // blocks).to(tl.int64)
    i = (tl.program_id(0) % blocks).to(tl.int64) * BF + tl.arange(0, BF)
    products = tl.zeros((BF, BD), tl.float32)
    for start in range(0, d, BD):
        c = start + tl.arange(0, BD)
        there = (i < f)[:, None] & (c < d)[None, :]
        w = tl.load(weights + i[:, None] * d + c[None, :], mask=there, other=0.0).to(tl.float32)
        products += w * tl.load(x + t * d + c, mask=c < d, other=0.0).to(tl.float32)[None, :]
    query = tl.sum(products, axis=1)
    if NORM:
        scale = tl.load(gain + i, mask=i < f, other=0.0).to(tl.float32)
        scale = scale / tl.sqrt(tl.load(variance + i, mask=i < f, other=1.0).to(tl.float32) + eps)
        query = (query - tl.load(centre + i, mask=i < f, other=0.0).to(tl.float32)) * scale
        query = query + tl.load(shift + i, mask=i < f, other=0.0).to(tl.float32)
    tl.store(out + t * f + i, query, mask=i < f)

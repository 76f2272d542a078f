"""The definition of every operation, in plain torch and autograd. Slow, obvious, runs anywhere."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from moestro.ops.activations import activation as find


def expert_ffn(
    x: Float[Tensor, "t d"],
    token: Int[Tensor, "n"],
    weight: Float[Tensor, "n"],
    offsets: Int[Tensor, "e1"],
    w_in: Float[Tensor, "gs d"],
    w_out: Float[Tensor, "s d"],
    widths: Sequence[int],
    activation: str,
) -> Float[Tensor, "t d"]:
    """y_t = sum over the rows n of token t of weight_n * FFN_e(x_t), rows in expert order (see `ops.ffn`)."""
    act = find(activation).forward
    glu = len(w_in) == 2 * len(w_out)
    y = x.new_zeros(x.shape)
    bounds = offsets.tolist()
    unit = 0
    for e, width in enumerate(widths):
        rows = slice(bounds[e], bounds[e + 1])
        block = w_in[unit * (1 + glu) : (unit + width) * (1 + glu)]
        z = x[token[rows]] @ block.T
        hidden = act(z[:, :width]) * z[:, width:] if glu else act(z)
        out = hidden @ w_out[unit : unit + width]
        y = y.index_add(0, token[rows], out * weight[rows, None].to(out.dtype))
        unit += width
    return y


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
    """y_t = sum_k weight_tk * hidden_tk * down[ids_tk], hidden_tk = act(up[ids_tk] . x_t), or with a third table
    act(gate[ids_tk] . x_t) * (up[ids_tk] . x_t); materialises every gathered row."""

    def along(table: Tensor) -> Tensor:
        return torch.einsum("td,tkd->tk", x, F.embedding(ids, table, sparse=sparse_gradients).to(x.dtype))

    act = find(activation).forward
    hidden = act(along(up)) if gate is None else act(along(gate)) * along(up)
    return value_rows(ids, hidden * weight.to(hidden.dtype), down, sparse_gradients)


def value_rows(
    ids: Int[Tensor, "t k"],
    weight: Float[Tensor, "t k"],
    values: Float[Tensor, "e d"],
    sparse_gradients: bool = False,
) -> Float[Tensor, "t d"]:
    """y_t = sum_k weight_tk * values[ids_tk]; materialises every gathered row."""
    rows = F.embedding(ids, values, sparse=sparse_gradients).to(weight.dtype)
    return torch.einsum("tk,tkd->td", weight, rows)


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
    """y_t = sum_k weight_tk * sum of act(up_j . x_t) * down_j over the neurons j of expert ids_tk, which are
    starts[ids_tk], ..., starts[ids_tk + 1] - 1; materialises as many rows for each as the widest has."""
    first, width = starts[ids], starts.diff()[ids]
    place = torch.arange(max(1, int(starts.diff().max())), device=ids.device)
    there = place < width[..., None]
    neuron = torch.where(there, first[..., None] + place, 0)
    each = (weight[..., None] * there).flatten(1)
    return singleton_experts(x, neuron.flatten(1), each, up, down, activation, sparse_gradients)


def product_key_topk(
    query: Float[Tensor, "t h c"], keys: Float[Tensor, "2 g n half"], k: int
) -> tuple[Float[Tensor, "t h k"], Int[Tensor, "t h k"]]:
    """The k best of all n*n keys by brute force: score(i*n + j) = q1 . keys[0, i] + q2 . keys[1, j].

    Equal scores are in the order of their pairs, the better left key first, then the better right one; equal keys of a
    side in their own order.
    """
    first, second = query.chunk(2, dim=-1)
    n = keys.shape[2]
    keys = keys.expand(2, query.shape[1], *keys.shape[2:])
    left, i = torch.einsum("thc,hnc->thn", first, keys[0]).sort(dim=-1, descending=True, stable=True)
    right, j = torch.einsum("thc,hnc->thn", second, keys[1]).sort(dim=-1, descending=True, stable=True)
    every = (left[..., :, None] + right[..., None, :]).flatten(-2)
    scores, pair = (best[..., :k] for best in every.sort(dim=-1, descending=True, stable=True))
    return scores, i.gather(-1, pair // n) * n + j.gather(-1, pair % n)


def entmax15(logits: Float[Tensor, "*b e"]) -> Float[Tensor, "*b e"]:
    """p = max(z / 2 - tau, 0)^2 with sum 1 (see `ops.entmax`): of the k largest logits, tau_k is what makes theirs sum
    to 1, and k counts the logits that are not below their own tau_k.

    No p exceeds 1, so that tau is at least max(z) / 2 - 1: logits below that, -inf too, may be taken for it.
    """
    z = ((logits - logits.amax(-1, keepdim=True)) / 2).clamp(min=-1)
    best = z.sort(dim=-1, descending=True).values
    k = torch.arange(1, z.shape[-1] + 1, device=z.device, dtype=z.dtype)
    mean, moment = best.cumsum(-1) / k, best.square().cumsum(-1) / k
    left = (1 - k * (moment - mean.square())) / k
    # where the root is of 0 or less it is not chosen, or of no slope: autograd's would be infinite
    tau = mean - torch.where(left > 0, left, 1).sqrt() * (left > 0)
    support = (tau <= best).sum(-1, keepdim=True)
    return (z - tau.gather(-1, support - 1)).clamp(min=0).square()

"""A Llama-style decoder written from its equations, one position and one head at a time.

Pre-norm residual blocks: RMSNorm (Zhang & Sennrich 2019), rotary positions (Su et al. 2021,
with feature c paired with c + head_dim/2), grouped-query attention (Ainslie et al. 2023), SwiGLU (Shazeer
2020). `weights` holds, all as (out, in) matrices:

embed[v, d]; per block i: blocks.i.attention_norm[d], blocks.i.{q,k,v,o}, blocks.i.ffn_norm[d],
blocks.i.{gate,up,down}; norm[d]; head[v, d] (absent: the embedding is tied).
"""

import math

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * scale for one vector."""
    return x / torch.sqrt((x * x).mean() + eps) * scale


def rotate(x: Tensor, position: int, theta: float) -> Tensor:
    """One head's vector turned by `position`: pair (c, c + D/2) by the angle position * theta^(-2c/D)."""
    half = len(x) // 2
    low, high = [], []
    for c in range(half):
        angle = position * theta ** (-2 * c / len(x))
        low.append(x[c] * math.cos(angle) - x[c + half] * math.sin(angle))
        high.append(x[c + half] * math.cos(angle) + x[c] * math.sin(angle))
    return torch.stack(low + high)


def attend(q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """softmax(q . k_s / sqrt(D)) mixed values, over the positions given."""
    scores = torch.stack([torch.dot(q, k) for k in keys]) / math.sqrt(len(q))
    e = torch.exp(scores - scores.max().detach())
    p = e / e.sum()
    return sum((p[s] * values[s] for s in range(len(values))), start=torch.zeros_like(values[0]))


def attention(x: Tensor, w: Weights, n_heads: int, n_kv_heads: int, theta: float, documents: list[int]) -> Tensor:
    """Causal grouped-query attention for one sequence x[s, d]; position t sees s <= t of its own document."""
    head_dim = len(w["q"]) // n_heads

    def head(name: str, t: int, a: int) -> Tensor:
        return w[name][a * head_dim : (a + 1) * head_dim] @ x[t]

    rows = []
    for t in range(len(x)):
        visible = [s for s in range(t + 1) if documents[s] == documents[t]]
        mixed = []
        for a in range(n_heads):
            group = a // (n_heads // n_kv_heads)
            keys = [rotate(head("k", s, group), s, theta) for s in visible]
            values = [head("v", s, group) for s in visible]
            mixed.append(attend(rotate(head("q", t, a), t, theta), keys, values))
        rows.append(w["o"] @ torch.cat(mixed))
    return torch.stack(rows)


def swiglu(x: Tensor, w: Weights) -> Tensor:
    """W_down ( SiLU(W_gate x) * (W_up x) ) for one sequence."""
    rows = []
    for x_t in x:
        g = w["gate"] @ x_t
        rows.append(w["down"] @ (g / (1 + torch.exp(-g)) * (w["up"] @ x_t)))
    return torch.stack(rows)


def block_weights(weights: Weights, i: int) -> Weights:
    prefix = f"blocks.{i}."
    return {name[len(prefix) :]: w for name, w in weights.items() if name.startswith(prefix)}


def forward(
    tokens: list[int],
    weights: Weights,
    *,
    n_layers: int,
    n_heads: int,
    n_kv_heads: int,
    theta: float = 10000.0,
    eps: float = 1e-5,
    documents: list[int] | None = None,
    ffns: dict | None = None,
) -> Tensor:
    """Logits[s, v] of one sequence; `ffns` maps a block to the function x[s, d] -> y[s, d] in place of its SwiGLU."""
    documents = documents or [0] * len(tokens)
    x = torch.stack([weights["embed"][token] for token in tokens])
    for i in range(n_layers):
        w = block_weights(weights, i)
        normed = torch.stack([rms_norm(x_t, w["attention_norm"], eps) for x_t in x])
        x = x + attention(normed, w, n_heads, n_kv_heads, theta, documents)
        normed = torch.stack([rms_norm(x_t, w["ffn_norm"], eps) for x_t in x])
        x = x + (ffns[i](normed) if ffns and i in ffns else swiglu(normed, w))
    head = weights.get("head", weights["embed"])
    return torch.stack([head @ rms_norm(x_t, weights["norm"], eps) for x_t in x])


def cross_entropy(logits: Tensor, targets: list[int]) -> Tensor:
    """Mean negative log-likelihood in nats over the targets that are not -100."""
    losses = []
    for row, target in zip(logits, targets, strict=True):
        if target != -100:
            largest = row.max().detach()
            losses.append(largest + torch.log(torch.exp(row - largest).sum()) - row[target])
    return torch.stack(losses).mean()

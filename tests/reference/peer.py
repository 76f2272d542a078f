"""PEER (He 2024, arXiv:2407.04153) from its equations and Algorithm 1, over all N experts, one by one.

Weights: query_weight[h*dk, d], keys1[n, dk/2] and keys2[n, dk/2] shared by the heads, or [h, n, dk/2] each;
u[N, d], v[N, d]. Expert i*n + j belongs to sub-key i of keys1 and sub-key j of keys2.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Retrieved = tuple[Tensor, list[int]]
Table = Tensor | list[Tensor]


def activation(a: Tensor, name: str = "gelu") -> Tensor:
    """sigma of Alg. 1 (the paper: "such as ReLU or GELU"); GELU in its exact form a Phi(a)."""
    if name == "gelu":
        return 0.5 * a * (1 + torch.erf(a / math.sqrt(2)))
    if name == "silu":
        return a / (1 + torch.exp(-a))
    return {"relu": torch.clamp(a, min=0), "none": a}[name]


def queries(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The h query networks together: q_t = W_q x_t (+ b), one row of h*dk features per token."""
    rows = []
    for x_t in x:
        q = weight @ x_t
        rows.append(q if bias is None else q + bias)
    return torch.stack(rows)


def batch_moments(q: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every feature over the given (non-padding) tokens."""
    mean, var = torch.zeros_like(q[0]), torch.zeros_like(q[0])
    for q_t in q:
        mean = mean + q_t / len(q)
    for q_t in q:
        var = var + (q_t - mean) ** 2 / len(q)
    return mean, var


def normalized(q: Tensor, mean: Tensor, var: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """Batch norm with given moments: the batch's own in training, the running ones in evaluation."""
    return (q - mean) / torch.sqrt(var + eps) * scale + shift


def unit_rms(vector: Tensor, eps: float = 1e-6) -> Tensor:
    """A vector divided by its root mean square."""
    mean = torch.zeros_like(vector[0])
    for number in vector:
        mean = mean + number * number / len(vector)
    return vector / torch.sqrt(mean + eps)


def unit_queries(q: Tensor, half: int, gain: Tensor) -> Tensor:
    """Query-key normalisation of queries: each half of each head's query, times the gain of every feature."""
    rows = [torch.cat([unit_rms(q_t[a : a + half]) for a in range(0, len(q_t), half)]) for q_t in q]
    return torch.stack(rows) * gain


def unit_keys(keys: Tensor) -> Tensor:
    """Query-key normalisation of sub-keys [g, n, half]."""
    return torch.stack([torch.stack([unit_rms(key) for key in group]) for group in keys])


def running(old: Tensor, new: Tensor, momentum: float) -> Tensor:
    """One step of a running statistic: (1 - momentum) old + momentum new."""
    return (1 - momentum) * old + momentum * new


def unbiased(var: Tensor, n_tokens: int) -> Tensor:
    """The variance that BatchNorm keeps for evaluation: n/(n-1) times the biased one."""
    return var * n_tokens / (n_tokens - 1)


def head_keys(keys: Tensor, head: int) -> Tensor:
    """Sub-keys of one head: keys[n, dk/2] serve every head, keys[h, n, dk/2] one each."""
    return keys if keys.dim() == 2 else keys[head]


def score(q: Tensor, keys1: Tensor, keys2: Tensor, index: int) -> Tensor:
    """Score of product key i*n + j for one head's query q = [q1; q2]: q1 . c_i + q2 . c'_j."""
    n, half = keys1.shape
    return torch.dot(q[:half], keys1[index // n]) + torch.dot(q[half:], keys2[index % n])


def all_scores(q: Tensor, keys1: Tensor, keys2: Tensor) -> Tensor:
    """Scores of all N = n*n product keys."""
    return torch.stack([score(q, keys1, keys2, index) for index in range(len(keys1) ** 2)])


def retrieve(q: Tensor, keys1: Tensor, keys2: Tensor, k: int) -> Retrieved:
    """Brute-force top-k over all N keys, what product keys must equal: falling scores, expert indices."""
    with torch.no_grad():
        values = all_scores(q, keys1, keys2).tolist()
    index = sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]
    return torch.stack([score(q, keys1, keys2, i) for i in index]), index


def staircase(q: Tensor, keys1: Tensor, keys2: Tensor, k: int) -> set[int]:
    """Top-k from only the pairs (p, r) of per-axis ranks with p*r <= k, ranks counted from 1."""
    half = keys1.shape[1]
    s1, s2 = (keys1 @ q[:half]).tolist(), (keys2 @ q[half:]).tolist()
    order1 = sorted(range(len(s1)), key=lambda i: -s1[i])[:k]
    order2 = sorted(range(len(s2)), key=lambda j: -s2[j])[:k]
    pairs = []
    for p, i in enumerate(order1, start=1):
        for r, j in enumerate(order2, start=1):
            if p * r <= k:
                pairs.append((s1[i] + s2[j], i * len(s1) + j))
    return {index for _, index in sorted(pairs, reverse=True)[:k]}


def gate(scores: Tensor, kind: str = "softmax") -> Tensor:
    """Gates of the k selected scores of one head; Algorithm 1 uses their softmax, without temperature."""
    if kind == "sigmoid":
        return 1 / (1 + torch.exp(-scores))
    if kind == "relu":
        return torch.clamp(scores, min=0)
    e = torch.exp(scores - scores.max().detach())
    return {"softmax": e / e.sum(), "one": torch.ones_like(scores)}[kind]


def expert(x: Tensor, u: Tensor, v: Tensor, sigma: str = "gelu") -> Tensor:
    """Alg. 1, one expert: e_i(x) = sigma(u_i . x) v_i."""
    return activation(torch.dot(u, x), sigma) * v


def glu_expert(x: Tensor, g: Tensor, u: Tensor, v: Tensor, sigma: str = "silu") -> Tensor:
    """One expert with a third vector: e_i(x) = sigma(g_i . x) (u_i . x) v_i."""
    return activation(torch.dot(g, x), sigma) * torch.dot(u, x) * v


def wide_expert(x: Tensor, u: Tensor, v: Tensor, sigma: str = "gelu") -> Tensor:
    """One expert of w neurons, u[w, d] and v[w, d]: e_i(x) = sum_j sigma(u_ij . x) v_ij."""
    y = torch.zeros_like(x)
    for u_j, v_j in zip(u, v, strict=True):
        y = y + expert(x, u_j, v_j, sigma)
    return y


def layer(
    x: Tensor,
    q: Tensor,
    keys1: Tensor,
    keys2: Tensor,
    u: Table,
    v: Table,
    *,
    heads: int,
    k: int,
    kind: str = "softmax",
    sigma: str = "gelu",
) -> tuple[Tensor, Tensor, list[list[list[int]]]]:
    """Algorithm 1: `mixture` of one-neuron experts with vectors u[i] and v[i]."""
    return mixture(x, q, keys1, keys2, lambda x_t, i: expert(x_t, u[i], v[i], sigma), heads=heads, k=k, kind=kind)


def mixture(
    x: Tensor,
    q: Tensor,
    keys1: Tensor,
    keys2: Tensor,
    each: Callable[[Tensor, int], Tensor],
    *,
    heads: int,
    k: int,
    kind: str = "softmax",
) -> tuple[Tensor, Tensor, list[list[list[int]]]]:
    """Eq. 7: y_t = sum over heads and their k experts of g e_i(x_t), e_i(x) = each(x, i), queries q[T, h*dk] given.

    Returns (y[T, d], gates[T, h, k], indices[T][h][k]).
    """
    d_key = q.shape[1] // heads
    ys, all_gates, all_index = [], [], []
    for x_t, q_t in zip(x, q, strict=True):
        y_t, gates_t, index_t = torch.zeros_like(x_t), [], []
        for a in range(heads):
            scores, index = retrieve(q_t[a * d_key : (a + 1) * d_key], head_keys(keys1, a), head_keys(keys2, a), k)
            g = gate(scores, kind)
            for weight, i in zip(g, index, strict=True):
                y_t = y_t + weight * each(x_t, i)
            gates_t.append(g)
            index_t.append(index)
        ys.append(y_t)
        all_gates.append(torch.stack(gates_t))
        all_index.append(index_t)
    return torch.stack(ys), torch.stack(all_gates), all_index


def dense_mixture(
    x: Tensor,
    q: Tensor,
    keys1: Tensor,
    keys2: Tensor,
    u: Table,
    v: Table,
    *,
    heads: int,
    k: int,
    sigma: str = "gelu",
) -> Tensor:
    """The same layer as a mixture of all N experts: softmax over N with -inf outside the top-k."""
    d_key = q.shape[1] // heads
    ys = []
    for x_t, q_t in zip(x, q, strict=True):
        y_t = torch.zeros_like(x_t)
        for a in range(heads):
            scores = all_scores(q_t[a * d_key : (a + 1) * d_key], head_keys(keys1, a), head_keys(keys2, a))
            mask = torch.full_like(scores, -math.inf)
            mask[scores.topk(k).indices] = 0
            g = torch.softmax(scores + mask, dim=0)
            for i in range(len(u)):
                y_t = y_t + g[i] * expert(x_t, u[i], v[i], sigma)
        ys.append(y_t)
    return torch.stack(ys)


def gate_share(gates: Tensor, index: list[list[list[int]]], n_experts: int) -> list[float]:
    """z'_i = sum over tokens of the GATE given to expert i (not counts); z is z' divided by its total."""
    z = [0.0] * n_experts
    for t, heads in enumerate(index):
        for a, members in enumerate(heads):
            for c, i in enumerate(members):
                z[i] += gates[t, a, c].item()
    total = sum(z)
    return [z_i / total for z_i in z]


def parameter_penalty(widths: list[int], gates: Tensor, index: list[list[list[int]]]) -> Tensor:
    """Ours, for retrieved experts: sum over the widths c of (N / n_c) (c / mean width) F_c P_c. n_c of the N experts
    have width c, F_c is the share of all retrieved rows (no gradient) and P_c the share of all gates that they have."""
    total, mean, n_rows = gates.sum(), sum(widths) / len(widths), gates.numel()
    penalty = torch.zeros_like(total)
    for c in sorted(set(widths)):
        rows, share = 0, torch.zeros_like(total)
        for t, heads in enumerate(index):
            for a, members in enumerate(heads):
                for place, i in enumerate(members):
                    if widths[i] == c:
                        rows, share = rows + 1, share + gates[t, a, place] / total
        penalty = penalty + len(widths) / widths.count(c) * c / mean * (rows / n_rows) * share
    return penalty


def usage(z: list[float]) -> float:
    """Share of experts with z_i > 0."""
    return sum(z_i > 0 for z_i in z) / len(z)


def unevenness(z: list[float]) -> float:
    """The paper's unevenness, KL from uniform in nats: log N + sum_i z_i log z_i, 0 log 0 = 0."""
    return math.log(len(z)) + sum(z_i * math.log(z_i) for z_i in z if z_i > 0)


def parameters(
    n_experts: int,
    d_model: int,
    heads: int,
    d_key: int,
    *,
    shared_keys: bool = True,
    bias: bool = False,
    affine_norm: bool = True,
) -> int:
    """2 N d + h d dk (+ h dk) + 2 n (dk/2) (1 or h) + 2 h dk of the query norm."""
    n = math.isqrt(n_experts)
    keys = 2 * n * (d_key // 2) * (1 if shared_keys else heads)
    return (
        2 * n_experts * d_model
        + heads * d_model * d_key
        + (heads * d_key if bias else 0)
        + keys
        + (2 * heads * d_key if affine_norm else 0)
    )


def flops(n_experts: int, d_model: int, heads: int, top_k: int, d_key: int) -> dict[str, int]:
    """Forward FLOPs of one token, a multiply-add counted as 2: queries, sub-key scores, the h*k experts."""
    n = math.isqrt(n_experts)
    return {
        "query": 2 * d_model * heads * d_key,
        "keys": 2 * heads * n * d_key,
        "experts": 4 * d_model * heads * top_k,
    }

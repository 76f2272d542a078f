"""Expert choice (arXiv:2202.09368), mixture-of-depths' choice (arXiv:2404.02258) and ReLU routing (arXiv:2412.14711),
one expert and one token at a time."""

import math

import torch

Tensor = torch.Tensor


def softmax(logits: Tensor) -> Tensor:
    """Over experts, token by token."""
    rows = []
    for row in logits:
        e = torch.exp(row - row.max().detach())
        rows.append(e / e.sum())
    return torch.stack(rows)


def expert_choice(scores: Tensor, factor: float) -> Tensor:
    """G: every expert takes its T * factor / E (rounded up) best tokens and weighs them by their score."""
    n_tokens, n_experts = scores.shape
    room = min(n_tokens, math.ceil(n_tokens * factor / n_experts))
    gates = []
    for e in range(n_experts):
        order = sorted(range(n_tokens), key=lambda t: (-scores[t, e].item(), t))
        gates.append(torch.stack([scores[t, e] if t in order[:room] else 0 * scores[t, e] for t in range(n_tokens)]))
    return torch.stack(gates, 1)


def mixture_of_depths(x: Tensor, weight: Tensor, share: float, block, length: int | None = None) -> Tensor:
    """One sequence [s d]: x_t + r_t (block(chosen, positions)_t - x_t) for the share of its first `length` tokens with
    the largest r_t = w . x_t, x_t for all others; `block` sees the chosen tokens in their order."""
    length = len(x) if length is None else length
    r = [torch.dot(weight, token) for token in x[:length]]
    order = sorted(range(length), key=lambda t: (-r[t].item(), t))[: math.ceil(share * length)]
    chosen = sorted(order)
    y = block(torch.stack([x[t] for t in chosen]), chosen) if chosen else []
    return torch.stack([x[t] + r[t] * (y[chosen.index(t)] - x[t]) if t in chosen else x[t] for t in range(len(x))])


def relu_gates(logits: Tensor) -> Tensor:
    """g = max(logit, 0)."""
    return torch.stack([torch.stack([v if v.item() > 0 else 0 * v for v in row]) for row in logits])


def gate_l1(logits: Tensor, pressure: float, target: float) -> Tensor:
    """lambda E sum_e f_e mean_t g_te, f_e = load_e / (T k)."""
    n_tokens, n_experts = logits.shape
    g, loss = relu_gates(logits), torch.zeros((), dtype=logits.dtype)
    for e in range(n_experts):
        load = sum(logits[t, e].item() > 0 for t in range(n_tokens))
        loss = loss + n_experts * load / (n_tokens * target) * g[:, e].sum() / n_tokens
    return pressure * loss


def next_pressure(pressure: float, layers: list[Tensor], target: float, factor: float = 1.2) -> float:
    """lambda * factor where the mean sparsity over layers is below 1 - k / E, else lambda / factor."""
    zero = [float((logits <= 0).double().mean()) for logits in layers]
    sparsity = sum(zero) / len(zero)
    return pressure * factor if sparsity < 1 - target / layers[0].shape[1] else pressure / factor

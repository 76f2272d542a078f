"""XMoE (arXiv:2403.18926) from its released code, one token and one expert at a time: threshold selection, capacity by
rank and probability, the loss on first choices, biasless two-matrix experts."""

import math

import torch

Tensor = torch.Tensor
Pair = tuple[int, int]  # token, expert


def probabilities(x: Tensor, router: Tensor) -> Tensor:
    """Softmax of W x, token by token."""
    rows = []
    for token in x:
        logits = router @ token
        e = torch.exp(logits - logits.max().detach())
        rows.append(e / e.sum())
    return torch.stack(rows)


def wanted(p: Tensor, threshold: float) -> list[int]:
    """Experts of one token, best first: rank j while the mass before it is below the threshold; the first always."""
    order = sorted(range(len(p)), key=lambda e: (-p[e].item(), e))
    if threshold >= 1:
        return order
    chosen, mass = [], 0.0
    for rank, e in enumerate(order):
        if rank == 0 or mass < threshold:
            chosen.append(e)
        mass += p[e].item()
    return chosen


def capacity(n_tokens: int, n_experts: int, factor: float, minimum: int) -> int:
    """c = max(ceil(T / E * CF), minimum)."""
    return max(math.ceil(n_tokens / n_experts * factor), minimum)


def kept(probs: Tensor, threshold: float, c: int) -> list[Pair]:
    """Every expert keeps its c best claims: lowest rank first, then highest probability."""
    claims: dict[int, list[tuple[int, float, int]]] = {e: [] for e in range(probs.shape[1])}
    for t, p in enumerate(probs):
        for rank, e in enumerate(wanted(p, threshold)):
            claims[e].append((rank, -p[e].item(), t))
    return [(t, e) for e, list_ in claims.items() for _, _, t in sorted(list_)[:c]]


def gelu(z: Tensor) -> Tensor:
    return z * (1 + torch.erf(z / math.sqrt(2))) / 2


def expert(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """W_out gelu(W_in x), W_in [w, d], W_out [d, w]."""
    return down @ gelu(up @ x)


def layer(x: Tensor, router: Tensor, experts: list[tuple[Tensor, Tensor]], threshold: float, c: int) -> Tensor:
    """y = sum over kept pairs of P_e FFN_e(x), weights not renormalised."""
    probs = probabilities(x, router)
    rows = [torch.zeros_like(token) for token in x]
    for t, e in kept(probs, threshold, c):
        rows[t] = rows[t] + probs[t, e] * expert(x[t], *experts[e])
    return torch.stack(rows)


def first_choice_balance(probs: Tensor) -> Tensor:
    """E sum_e mean_t(P_te) mean_t(1[argmax_t = e])."""
    n_tokens, n_experts = probs.shape
    loss = torch.zeros((), dtype=probs.dtype)
    for e in range(n_experts):
        first = sum(int(p.argmax()) == e for p in probs) / n_tokens
        loss = loss + n_experts * first * probs[:, e].sum() / n_tokens
    return loss

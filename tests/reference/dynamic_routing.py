"""Dynamic routing (Huang et al. 2024, "Harder Tasks Need More Experts", arXiv:2403.07652) from its equations, one token
and one expert at a time. An expert is a function of one token x[d]; W[E, d] is the router."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def probabilities(x: Tensor, W: Tensor) -> Tensor:
    """P = softmax(W x) of one token."""
    e = torch.exp(W @ x - (W @ x).max())
    return e / e.sum()


def chosen(p: Tensor, threshold: float) -> list[int]:
    """S: the t most probable experts, t the smallest j with P_(1) + ... + P_(j) > p, all where there is none."""
    order = sorted(range(len(p)), key=lambda e: (-p[e].item(), e))
    total = 0.0
    for t, e in enumerate(order, start=1):
        total += p[e].item()
        if total > threshold:
            return order[:t]
    return order


def layer(
    x: Tensor, W: Tensor, experts: Sequence[Callable[[Tensor], Tensor]], threshold: float
) -> tuple[Tensor, list[Tensor], list[list[int]]]:
    """y = sum over S of P_e FFN_e(x), P not renormalised, for all tokens: (y, P, S)."""
    rows, every, sets = [], [], []
    for x_t in x:
        p = probabilities(x_t, W)
        members = chosen(p, threshold)
        y_t = torch.zeros_like(x_t)
        for e in members:
            y_t = y_t + p[e] * experts[e](x_t)
        rows.append(y_t)
        every.append(p)
        sets.append(members)
    return torch.stack(rows), every, sets


def balance(every: Sequence[Tensor], sets: Sequence[list[int]]) -> Tensor:
    """L_b = E sum_e f_e Q_e: f_e the fraction of tokens that use e, Q_e the mean of P_e; not divided by the mean k."""
    n_experts, n_tokens = len(every[0]), len(every)
    total = torch.zeros((), dtype=every[0].dtype)
    for e in range(n_experts):
        fraction = sum(e in members for members in sets) / n_tokens
        for p in every:
            total = total + n_experts * fraction * p[e] / n_tokens
    return total


def entropy(every: Sequence[Tensor]) -> Tensor:
    """L_d = - sum_e P_e log P_e, the mean over tokens."""
    total = torch.zeros((), dtype=every[0].dtype)
    for p in every:
        for p_e in p:
            total = total - p_e * torch.log(p_e) / len(every)
    return total

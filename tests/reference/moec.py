"""MoEC (arXiv:2207.09094) from its released code, in scale-free form, one token, expert and cluster at a time."""

import math

import torch

Tensor = torch.Tensor


def cosines(x: Tensor, project: Tensor, directions: Tensor) -> Tensor:
    """c_te = cos(A x_t, v_e)."""
    rows = []
    for token in x:
        z = project @ token
        z = z / torch.sqrt((z * z).sum())
        rows.append(torch.stack([torch.dot(z, v) / torch.sqrt((v * v).sum()) for v in directions]))
    return torch.stack(rows)


def gates(c: Tensor, tau: Tensor) -> Tensor:
    """alpha = sigmoid(c / tau) of the largest cosine, 0 for every other expert."""
    rows = []
    for token in c:
        best = int(token.argmax())
        alpha = 1 / (1 + torch.exp(-token[best] / tau.clamp(min=1e-4)))
        rows.append(torch.stack([alpha if e == best else alpha * 0 for e in range(len(token))]))
    return torch.stack(rows)


def shares(c: Tensor, temperature: Tensor | float) -> Tensor:
    """P_e: mean over tokens of softmax_e(c / temperature)."""
    total = torch.zeros_like(c[0])
    for token in c:
        e = torch.exp((token - token.max().detach()) / temperature)
        total = total + e / e.sum() / len(c)
    return total


def balance(c: Tensor, temperature: Tensor | float) -> Tensor:
    """E sum_e P_e f_e, f_e the share of tokens sent to e."""
    p = shares(c, temperature)
    loss = torch.zeros((), dtype=c.dtype)
    for e in range(c.shape[1]):
        loss = loss + c.shape[1] * p[e] * sum(int(token.argmax()) == e for token in c) / len(c)
    return loss


def variance(values: list[Tensor]) -> Tensor:
    """Unbiased; 0 for one value."""
    mean = sum(values[1:], values[0]) / len(values)
    squares = [(value - mean) ** 2 for value in values]
    return sum(squares[1:], squares[0]) / max(1, len(values) - 1)


def within(p: Tensor, clusters: list[list[int]]) -> Tensor:
    """E^2 mean_m Var(P_e, e in m)."""
    each = [variance([p[e] for e in members]) for members in clusters]
    return sum(len(members) for members in clusters) ** 2 * sum(each[1:], each[0]) / len(clusters)


def gap(p: Tensor, clusters: list[list[int]]) -> Tensor:
    """Type 1 times exp(-(C1 - C2)), the two largest of the clusters' means of P."""
    means = [sum((p[e] for e in members), start=0 * p[0]) / len(members) for members in clusters]
    first, second = sorted(means, key=lambda mean: -mean.item())[:2]
    return within(p, clusters) * torch.exp(second - first)


def token_gap(c: Tensor, temperature: float, clusters: list[list[int]]) -> Tensor:
    """Type 1 times exp(-mean over tokens of (mass of the best cluster - mass of the second))."""
    total = torch.zeros((), dtype=c.dtype)
    for token in c:
        p = shares(token[None], temperature)
        masses = [sum((p[e] for e in members), start=0 * p[0]) for members in clusters]
        first, second = sorted(masses, key=lambda mass: -mass.item())[:2]
        total = total + (first - second) / len(c)
    return within(shares(c, temperature), clusters) * torch.exp(-total)


def resting_in_a_cluster(n: int, rate: float) -> int:
    """n - max(1, n - round(rate n))."""
    return n - max(1, n - math.floor(rate * n + 0.5))

"""Similarity of experts from the equations, with loops: CKA (Kornblith 2019, Eq. 3), unbiased HSIC (Song 2012, Eq.
5)."""

import itertools

import torch


def linear_cka(x, y):
    """||Y' X||_F^2 / (||X' X||_F ||Y' Y||_F) of features [n p] and [n q] with their means taken out."""
    x = x - x.mean(0)
    y = y - y.mean(0)

    def frobenius(matrix):
        return sum(float(value) ** 2 for value in matrix.flatten()) ** 0.5

    return frobenius(y.T @ x) ** 2 / (frobenius(x.T @ x) * frobenius(y.T @ y))


def unbiased_hsic(x, y):
    """1 / (n (n-3)) [tr(KL) + 1'K1 1'L1 / ((n-1)(n-2)) - 2 / (n-2) 1'KL1], diagonals of K = XX' and L = YY' set to
    0."""
    n = len(x)
    k = [[0.0 if i == j else float(x[i] @ x[j]) for j in range(n)] for i in range(n)]
    l = [[0.0 if i == j else float(y[i] @ y[j]) for j in range(n)] for i in range(n)]  # noqa: E741
    trace = sum(k[i][j] * l[j][i] for i in range(n) for j in range(n))
    ones = sum(map(sum, k)) * sum(map(sum, l))
    mixed = sum(k[i][j] * l[j][m] for i in range(n) for j in range(n) for m in range(n))
    return (trace + ones / ((n - 1) * (n - 2)) - 2 * mixed / (n - 2)) / (n * (n - 3))


def unbiased_cka(x, y):
    return unbiased_hsic(x, y) / (unbiased_hsic(x, x) * unbiased_hsic(y, y)) ** 0.5


def best_partition(alike, n_groups):
    """Every map of experts to groups: the one whose pairs in one group are most alike on average."""
    n, best = len(alike), None
    for labels in itertools.product(range(n_groups), repeat=n):
        if len(set(labels)) < n_groups:
            continue
        pairs = [alike[i][j] for i in range(n) for j in range(i) if labels[i] == labels[j]]
        value = sum(pairs) / len(pairs) if pairs else 0.0
        if best is None or value > best:
            best = value
    return best


def swiglu(gate, up, down, x):
    """down (silu(gate x) * up x) of one token, unit by unit."""
    y = torch.zeros(down.shape[0], dtype=x.dtype)
    for unit in range(gate.shape[0]):
        a = gate[unit] @ x
        y = y + down[:, unit] * (a * torch.sigmoid(a) * (up[unit] @ x))
    return y

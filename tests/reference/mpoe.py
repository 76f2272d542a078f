"""MPOE (Gao 2022, arXiv:2203.01104) from its equations: every entry of a matrix is a product of small matrices."""

import math
from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor


def entry(cores: Sequence[Tensor], i: Sequence[int], j: Sequence[int]) -> Tensor:
    """T_1[i_1, j_1] T_2[i_2, j_2] ... T_n[i_n, j_n], cores [D_{k-1}, i_k, j_k, D_k]."""
    chain = torch.eye(1, dtype=cores[0].dtype)
    for core, a, b in zip(cores, i, j, strict=True):
        chain = chain @ core[:, a, b, :]
    return chain[0, 0]


def matrix(cores: Sequence[Tensor]) -> Tensor:
    """W[(i_1 .. i_n), (j_1 .. j_n)], the last index fastest."""
    rows = list(product(*(range(core.shape[1]) for core in cores)))
    columns = list(product(*(range(core.shape[2]) for core in cores)))
    return torch.stack([torch.stack([entry(cores, i, j) for j in columns]) for i in rows])


def bonds(rows: Sequence[int], columns: Sequence[int]) -> list[int]:
    """D_k = min(prod_{m <= k} i_m j_m, prod_{m > k} i_m j_m)."""
    found = []
    for k in range(len(rows) + 1):
        before = math.prod(i * j for i, j in zip(rows[:k], columns[:k], strict=True))
        beyond = math.prod(i * j for i, j in zip(rows[k:], columns[k:], strict=True))
        found.append(min(before, beyond))
    return found


def parameters(rows: Sequence[int], columns: Sequence[int], n_experts: int) -> int:
    """|C| + N |aux| of one matrix."""
    d = bonds(rows, columns)
    sizes = [d[k] * rows[k] * columns[k] * d[k + 1] for k in range(len(rows))]
    central = sizes[len(rows) // 2]
    return central + n_experts * (sum(sizes) - central)


def silu(z: Tensor) -> Tensor:
    return z / (1 + torch.exp(-z))


def expert(x: Tensor, gate: Sequence[Tensor], up: Sequence[Tensor], out: Sequence[Tensor]) -> Tensor:
    """(silu(W_gate x) * W_up x)^T W_out, matrices [width, d] from their cores."""
    return (silu(matrix(gate) @ x) * (matrix(up) @ x)) @ matrix(out)

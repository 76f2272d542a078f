"""Router-norm-change pruning (arXiv:2405.16646): score, order and the two meanings of "pruned", in loops.

Rows are lists of numbers; experts are functions. Nothing is vectorised.
"""

import math

import torch
from torch import Tensor


def delta(before: Tensor, after: Tensor) -> list[float]:
    """Section 1, step 1: Delta_s = ||w1_s||_2 - ||w0_s||_2."""
    changes = []
    for s in range(len(before)):
        norms = []
        for row in (before[s], after[s]):
            total = 0.0
            for value in row.tolist():
                total += value * value
            norms.append(math.sqrt(total))
        changes.append(norms[1] - norms[0])
    return changes


def kept(change: list[float], n_kept: int) -> list[int]:
    """Section 1, step 2: prune the smallest Delta, of equal ones the lowest index first."""
    left = list(range(len(change)))
    while len(left) > n_kept:
        lowest = left[0]
        for s in left:
            if change[s] < change[lowest]:
                lowest = s
        left.remove(lowest)
    return left


def mixture(x: Tensor, rows: Tensor, experts: list, top_k: int, pruned: list[int], semantics: str) -> Tensor:
    """Softmax over experts, the top k of them, weights divided by their sum (Mixtral). "slice": pruned experts are not
    there; "zero": they are chosen and answer zero."""
    out = torch.zeros_like(x)
    for t in range(len(x)):
        there = [s for s in range(len(rows)) if semantics == "zero" or s not in pruned]
        logits = {s: float(rows[s] @ x[t]) for s in there}
        total = sum(math.exp(value) for value in logits.values())
        probability = {s: math.exp(value) / total for s, value in logits.items()}
        chosen = sorted(there, key=lambda s: -probability[s])[:top_k]
        mass = sum(probability[s] for s in chosen)
        for s in chosen:
            if s not in pruned:
                out[t] += probability[s] / mass * experts[s](x[t])
    return out

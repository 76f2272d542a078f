"""DynMoE (Guo et al. 2024, arXiv:2405.14297) written from its equations, one token and one expert at a time.

W[E, d] holds one router row for every slot of the pool, G[E] the thresholds, `mask` a list of bools (which slots are
active), `a` the sharpness. An expert is a function of one token x[d].
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Expert = Callable[[Tensor], Tensor]


class _Sign(torch.autograd.Function):
    """sign forward, identity backward: the straight-through estimator."""

    @staticmethod
    def forward(ctx, z):
        return torch.sign(z)

    @staticmethod
    def backward(ctx, grad):
        return grad


def cosine(x: Tensor, w: Tensor) -> Tensor:
    """Step 1: c = <x/|x|, w/|w|>."""
    return (x * w).sum() / ((x * x).sum().sqrt() * (w * w).sum().sqrt())


def gate(c: Tensor, threshold: Tensor, a: Tensor) -> Tensor:
    """Steps 1-3 of one pair: g = sign(relu(sigmoid(a c) - sigmoid(a G)))."""
    s, theta = 1 / (1 + torch.exp(-a * c)), 1 / (1 + torch.exp(-a * threshold))
    return _Sign.apply(torch.relu(s - theta))


def token_gates(x: Tensor, W: Tensor, G: Tensor, mask: Sequence[bool], a: Tensor) -> dict[int, Tensor]:
    """The gates of one token that are 1."""
    every = {e: gate(cosine(x, W[e]), G[e], a) for e in range(len(W)) if mask[e]}
    return {e: g for e, g in every.items() if g.item() == 1.0}


def layer(
    x: Tensor,
    W: Tensor,
    G: Tensor,
    experts: Sequence[Expert],
    mask: Sequence[bool],
    a: Tensor,
    *,
    training: bool = True,
    normalized: bool = False,
) -> tuple[Tensor, list[dict[int, Tensor]]]:
    """Steps 4 and 5 for all tokens x[T, d]: (y, the gates of every token)."""
    rows, chosen = [], []
    for x_t in x:
        gates = token_gates(x_t, W, G, mask, a)
        chosen.append(gates)
        if not gates and not training:
            best = max((e for e in range(len(W)) if mask[e]), key=lambda e, x_t=x_t: cosine(x_t, W[e]).item())
            rows.append(experts[best](x_t))
            continue
        total = sum(gates.values()) if normalized else len(gates)
        y_t = torch.zeros_like(x_t)
        for e, g in gates.items():
            y_t = y_t + g / total * experts[e](x_t)
        rows.append(y_t)
    return torch.stack(rows), chosen


def diversity(W: Tensor, mask: Sequence[bool]) -> Tensor:
    """Frobenius norm of W^T W - I over the active experts, rows of unit length."""
    active, total = [e for e in range(len(W)) if mask[e]], torch.zeros((), dtype=W.dtype)
    for i in active:
        for j in active:
            total = total + (cosine(W[i], W[j]) - (1.0 if i == j else 0.0)) ** 2
    return total.sqrt()


def simplicity(W: Tensor, mask: Sequence[bool]) -> Tensor:
    """Mean of |w_e| over the active experts."""
    lengths = [(W[e] * W[e]).sum().sqrt() for e in range(len(W)) if mask[e]]
    return torch.stack(lengths).mean()


def balance(chosen: Sequence[dict[int, Tensor]], mask: Sequence[bool]) -> Tensor:
    """K^2 mean_e(P_e f_e), K active experts: P_e the mean of g_e / k over tokens with k > 0, f_e that of g_e."""
    active, served = [e for e in range(len(mask)) if mask[e]], [gates for gates in chosen if gates]
    total = torch.zeros((), dtype=torch.float64)
    for e in active:
        share = sum(gates[e] / len(gates) for gates in served if e in gates) / len(served)
        fraction = sum(gates[e] for gates in chosen if e in gates) / len(chosen)
        total = total + share * fraction
    return len(active) * total


def efficiency(chosen: Sequence[dict[int, Tensor]], mask: Sequence[bool]) -> Tensor:
    """Mean of g over tokens and active experts."""
    every = [g for gates in chosen for g in gates.values()]
    return torch.stack(every).sum() / (len(chosen) * sum(mask))


def record(x: Tensor, chosen: Sequence[dict[int, Tensor]], n_experts: int) -> tuple[list[int], Tensor, int]:
    """(R_E, R_S, tokens summed in R_S) of one training forward."""
    used, unserved, count = [0] * n_experts, torch.zeros_like(x[0]), 0
    for x_t, gates in zip(x, chosen, strict=True):
        for e in gates:
            used[e] += 1
        if not gates:
            unserved, count = unserved + x_t, count + 1
    return used, unserved, count


def update(
    mask: Sequence[bool], used: Sequence[float], unserved: Tensor, count: int, W: Tensor, G: Tensor
) -> tuple[list[bool], int | None, Tensor, Tensor]:
    """The adaptive process at the end of a window: (mask, slot of the new expert, W, G)."""
    after, W, G = [m and r > 0 for m, r in zip(mask, used, strict=True)], W.clone(), G.clone()  # REMOVE
    slot = None
    if count > 0 and not all(after):  # ADD
        slot = after.index(False)
        after[slot] = True
        W[slot], G[slot] = unserved / (unserved * unserved).sum().sqrt(), 0.0
    return after, slot, W, G

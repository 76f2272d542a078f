"""muMoE (Oldfield 2024, arXiv:2402.12550) straight from its equations, with loops: every tensor is built."""

from collections.abc import Callable, Iterable, Sequence
from itertools import product

import torch
from torch import Tensor


def cp_tensor(experts: Sequence[Tensor], inputs: Tensor, outputs: Tensor) -> Tensor:
    """W[n_1 .. n_E, i, o] = sum_r U_1[n_1, r] .. U_E[n_E, r] U_i[i, r] U_o[o, r], expert modes flattened."""

    def entry(place: tuple[int, ...], i: int, o: int) -> Tensor:
        total = torch.zeros((), dtype=inputs.dtype)
        for r in range(inputs.shape[1]):
            term = inputs[i, r] * outputs[o, r]
            for table, n in zip(experts, place, strict=True):
                term = term * table[n, r]
            total = total + term
        return total

    return filled(entry, experts, inputs, outputs)


def tensor_ring_tensor(experts: Sequence[Tensor], inputs: Tensor, outputs: Tensor) -> Tensor:
    """W[n_1 .. n_E, i, o] = trace(G_1[n_1] .. G_E[n_E] G_i[i] G_o[o]^T), cores [size, rank before, rank after] and
    G_o[o] with its ranks in the order (first of the ring, last)."""

    def entry(place: tuple[int, ...], i: int, o: int) -> Tensor:
        chain = experts[0][place[0]]
        for table, n in zip(experts[1:], place[1:], strict=True):
            chain = chain @ table[n]
        return torch.trace(chain @ inputs[i] @ outputs[o].T)

    return filled(entry, experts, inputs, outputs)


def tucker_tensor(experts: Sequence[Tensor], inputs: Tensor, outputs: Tensor, core: Tensor) -> Tensor:
    """W[n_1 .. n_E, i, o] = sum core[a, (m_1 .. m_E), c] U_1[n_1, m_1] .. U_E[n_E, m_E] U_i[i, a] U_o[o, c]."""

    def entry(place: tuple[int, ...], i: int, o: int) -> Tensor:
        total = torch.zeros((), dtype=core.dtype)
        for m, ranks in enumerate(product(*(range(table.shape[1]) for table in experts))):
            weight = torch.ones((), dtype=core.dtype)
            for table, n, rank in zip(experts, place, ranks, strict=True):
                weight = weight * table[n, rank]
            total = total + weight * (inputs[i] @ core[:, m] @ outputs[o])
        return total

    return filled(entry, experts, inputs, outputs)


def filled(
    entry: Callable[[tuple[int, ...], int, int], Tensor], experts: Sequence[Tensor], inputs: Tensor, outputs: Tensor
) -> Tensor:
    places = product(*(range(len(table)) for table in experts))
    return torch.stack(
        [
            torch.stack([torch.stack([entry(p, i, o) for o in range(len(outputs))]) for i in range(len(inputs))])
            for p in places
        ]
    )


def linear(w: Tensor, gates: Sequence[Tensor], x: Tensor) -> Tensor:
    """y_o = sum over n_1 .. n_E and i of a_1[n_1] .. a_E[n_E] [x; 1]_i W[n_1 .. n_E, i, o], for one token."""
    y = torch.zeros(w.shape[2], dtype=w.dtype)
    extended = torch.cat([x, torch.ones(1, dtype=x.dtype)])
    for n, place in enumerate(product(*(range(len(a)) for a in gates))):
        weight = torch.ones((), dtype=w.dtype)
        for a, at in zip(gates, place, strict=True):
            weight = weight * a[at]
        for i in range(w.shape[1]):
            y = y + weight * extended[i] * w[n, i]
    return y


def total(values: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(values)).sum()


def entmax15(z: Tensor) -> Tensor:
    """p = max(z / 2 - tau, 0)^2, one row of logits: every size of the support is tried."""
    z = z / 2
    best = z.sort(descending=True).values
    for k in range(len(z), 0, -1):
        mean = total(best[:k]) / k
        spread = total((value - mean) ** 2 for value in best[:k])
        if spread <= 1:
            tau = mean - ((1 - spread) / k).sqrt()
            if tau <= best[k - 1]:
                return torch.stack([(value - tau) ** 2 if value >= tau else 0 * value for value in z])
    raise ArithmeticError("no support")


def layer_norm(z: Tensor, eps: float) -> Tensor:
    """(z - mean) / sqrt(variance + eps)."""
    centred = z - total(z) / len(z)
    return centred / (total(value**2 for value in centred) / len(z) + eps).sqrt()


def gates(x: Tensor, g: Sequence[Tensor], eps: float) -> list[Tensor]:
    """a_m = entmax15(LN(x G_m)) for one token, G_m [modes, d]."""
    return [entmax15(layer_norm(torch.stack([row @ x for row in matrix]), eps)) for matrix in g]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (total(value**2 for value in x) / len(x) + eps).sqrt() * weight


def block(x: Tensor, a: Sequence[Tensor], first: Tensor, second: Tensor, norm: Tensor, eps: float) -> Tensor:
    """x + mu_2(GELU(mu_1(norm(x), a)), a) for one token."""
    hidden = linear(first, a, rms_norm(x, norm, eps))
    hidden = torch.stack([0.5 * h * (1 + torch.erf(h / 2**0.5)) for h in hidden])
    return x + linear(second, a, hidden)

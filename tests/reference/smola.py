"""Omni-SMoLA (arXiv:2312.00968) in both of its readings, from the equations, one token and expert at a time."""

import torch
from torch import Tensor


def softmax(values: list[Tensor]) -> list[Tensor]:
    top = max(float(v.detach()) for v in values)
    powers = [torch.exp(v - top) for v in values]
    total = torch.stack(powers).sum()
    return [p / total for p in powers]


def lora(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """x A B for one token, A^T [r i], B [r o]."""
    out = torch.zeros(up.shape[1], dtype=x.dtype)
    for a, b in zip(down, up, strict=True):
        out = out + torch.dot(a, x) * b
    return out


def token_mixture(x: Tensor, phi: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Delta_t = sum_e g_te x_t A_e B_e, g_t = softmax(x_t Phi), Phi^T [e i]."""
    rows = []
    for token in x:
        gates = softmax([torch.dot(column, token) for column in phi])
        rows.append(sum(g * lora(token, a, b) for g, a, b in zip(gates, down, up, strict=True)))
    return torch.stack(rows)


def unit(v: Tensor) -> Tensor:
    return v / torch.sqrt((v * v).sum()).clamp(min=1e-6)


def slot_weights(x: Tensor, phi: Tensor, scale: Tensor) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """Dispatch[t][n] = softmax over tokens, combine[t][n] = softmax over slots of scale * cos(x_t, Phi_n)."""
    logits = [[scale * torch.dot(unit(token), unit(column)) for column in phi] for token in x]
    columns = [softmax([row[n] for row in logits]) for n in range(len(phi))]
    dispatch = [[columns[n][t] for n in range(len(phi))] for t in range(len(x))]
    return dispatch, [softmax(row) for row in logits]


def slot_mixture(x: Tensor, phi: Tensor, scale: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Z = D^T X, O = Z_e A_e B_e, Delta = C O; slots of an expert follow one another in Phi^T [e p, i]."""
    dispatch, combine = slot_weights(x, phi, scale)
    slots, outputs = len(phi) // len(down), []
    for n in range(len(phi)):
        z = sum(dispatch[t][n] * x[t] for t in range(len(x)))
        outputs.append(lora(z, down[n // slots], up[n // slots]))
    return torch.stack([sum(c * o for c, o in zip(combine[t], outputs, strict=True)) for t in range(len(x))])

"""Zero-computation experts from the equations of Jin 2024 (arXiv:2410.07348, section 3.1), row by row."""

import torch

Tensor = torch.Tensor


def zero(x: Tensor) -> Tensor:
    """E(x) = 0."""
    return 0 * x


def copy(x: Tensor) -> Tensor:
    """E(x) = x."""
    return x


def constant(x: Tensor, weight: Tensor, vector: Tensor) -> Tensor:
    """E(x) = a_1 x + a_2 v with [a_1, a_2] = Softmax(W x), W of shape [2, d]."""
    first, second = torch.dot(weight[0], x), torch.dot(weight[1], x)
    total = torch.exp(first) + torch.exp(second)
    return torch.exp(first) / total * x + torch.exp(second) / total * vector


def swiglu(x: Tensor, w_gate: Tensor, w_up: Tensor, w_out: Tensor) -> Tensor:
    """An ordinary expert: w_gate and w_up [h, d], w_out [d, h]."""
    gate = torch.mv(w_gate, x)
    return torch.mv(w_out, gate / (1 + torch.exp(-gate)) * torch.mv(w_up, x))

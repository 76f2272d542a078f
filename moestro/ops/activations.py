"""Activations with their derivatives, for operations that write their own backward pass."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


class Activation(NamedTuple):
    """`forward(z)`, `backward(grad, z)` = grad * f'(z), both once more writing to given memory (the last argument),
    and `second_moment` = E[f(z)^2] for z ~ N(0, 1)."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    forward_into: Callable[[Tensor, Tensor], Tensor]
    backward_into: Callable[[Tensor, Tensor, Tensor], Tensor]
    second_moment: float


ACTIVATIONS: dict[str, Activation] = {
    "silu": Activation(
        F.silu,
        lambda g, z: aten.silu_backward(g, z),
        lambda z, out: aten.silu.out(z, out=out),
        lambda g, z, out: aten.silu_backward.grad_input(g, z, grad_input=out),
        0.35577,
    ),
    "gelu": Activation(
        F.gelu,
        lambda g, z: aten.gelu_backward(g, z),
        lambda z, out: aten.gelu.out(z, out=out),
        lambda g, z, out: aten.gelu_backward.grad_input(g, z, grad_input=out),
        0.42522,
    ),
    # the tanh approximation, GPT-2's
    "gelu_tanh": Activation(
        lambda z: F.gelu(z, approximate="tanh"),
        lambda g, z: aten.gelu_backward(g, z, approximate="tanh"),
        lambda z, out: aten.gelu.out(z, approximate="tanh", out=out),
        lambda g, z, out: aten.gelu_backward.grad_input(g, z, approximate="tanh", grad_input=out),
        0.42519,
    ),
    "relu": Activation(
        F.relu,
        lambda g, z: aten.threshold_backward(g, z, 0),
        lambda z, out: aten.relu.out(z, out=out),
        lambda g, z, out: aten.threshold_backward.grad_input(g, z, 0, grad_input=out),
        0.5,
    ),
    "none": Activation(torch.clone, lambda g, z: g, lambda z, out: out.copy_(z), lambda g, z, out: out.copy_(g), 1.0),
}


def activation(name: str) -> Activation:
    """The activation of that name.

    Raises: ValueError for an unknown one.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation={name!r}, allowed: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]

"""Activations with their derivatives, for operations that write their own backward pass."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


class Activation(NamedTuple):
    """`forward(z)`, `backward(grad, z)` = grad * f'(z), and `second_moment` = E[f(z)^2] for z ~ N(0, 1)."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    second_moment: float


ACTIVATIONS: dict[str, Activation] = {
    "silu": Activation(F.silu, lambda g, z: aten.silu_backward(g, z), 0.35577),
    "gelu": Activation(F.gelu, lambda g, z: aten.gelu_backward(g, z), 0.42522),
    "relu": Activation(F.relu, lambda g, z: aten.threshold_backward(g, z, 0), 0.5),
    "none": Activation(torch.clone, lambda g, z: g, 1.0),
}


def activation(name: str) -> Activation:
    """The activation of that name.

    Raises: ValueError for an unknown one.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation={name!r}, allowed: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]

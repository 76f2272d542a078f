"""What a chosen expert's output may be weighted by: functions of the logits [t, e], all experts at once."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from moestro.ops import entmax15


class Gate(NamedTuple):
    """`scores(logits)` weigh experts; objectives on probabilities see `shown(logits)`, whose softmax is scores / sum of
    scores. Not so for two: `interpolate`, the sigmoid with which BASE layers (Lewis 2021, arXiv:2103.16716) and MoEC
    mix an expert with its input, beside softmax probabilities in their losses; and `entmax15`, whose exact zeros would
    be logits of -inf, the mark of experts that are not available."""

    scores: Callable[[Tensor], Tensor]
    shown: Callable[[Tensor], Tensor]


def log_softplus(logits: Float[Tensor, "t e"]) -> Float[Tensor, "t e"]:
    """log log(1 + e^z): z itself far below 0, where log(1 + e^z) would round to 0 and its root have no slope."""
    return torch.where(logits < -40, logits, F.softplus(logits.clamp(min=-40)).log())


GATES: dict[str, Gate] = {
    "softmax": Gate(lambda logits: logits.softmax(-1), lambda logits: logits),
    "sigmoid": Gate(lambda logits: logits.sigmoid(), F.logsigmoid),
    "interpolate": Gate(lambda logits: logits.sigmoid(), lambda logits: logits),
    "entmax15": Gate(entmax15, lambda logits: logits),
    "sqrt_softplus": Gate(lambda logits: (log_softplus(logits) / 2).exp(), lambda logits: log_softplus(logits) / 2),
}


def gate(name: str) -> Gate:
    """The gate of that name.

    Raises: ValueError for an unknown one.
    """
    if name not in GATES:
        raise ValueError(f"gate={name!r}, allowed: {', '.join(GATES)}")
    return GATES[name]


def shares(gates: Float[Tensor, "t k"]) -> Float[Tensor, "t k"]:
    """Each token's gates divided by their sum; where all are 0, as independent gates may round to, they stay 0."""
    return gates / gates.sum(-1, keepdim=True).clamp(min=torch.finfo(gates.dtype).tiny)

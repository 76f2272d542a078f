"""What a chosen expert's output may be weighted by: functions of the logits [t, e], all experts at once."""

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class Gate(NamedTuple):
    """`scores(logits)` weigh experts; `shown(logits)` are logits whose softmax is scores / sum of scores, for
    objectives on probabilities."""

    scores: Callable[[Tensor], Tensor]
    shown: Callable[[Tensor], Tensor]


GATES: dict[str, Gate] = {
    "softmax": Gate(lambda logits: logits.softmax(-1), lambda logits: logits),
    "sigmoid": Gate(lambda logits: logits.sigmoid(), F.logsigmoid),
    "sqrt_softplus": Gate(lambda logits: F.softplus(logits).sqrt(), lambda logits: F.softplus(logits).log() / 2),
}


def gate(name: str) -> Gate:
    """The gate of that name.

    Raises: ValueError for an unknown one.
    """
    if name not in GATES:
        raise ValueError(f"gate={name!r}, allowed: {', '.join(GATES)}")
    return GATES[name]

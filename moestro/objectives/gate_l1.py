"""What presses gates that may be zero towards it."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from moestro.objectives.balance import n_present, require_logits, shares
from moestro.routers import ReLU
from moestro.routing import Trace


@dataclass(frozen=True)
class GateL1:
    """pressure * N sum_e f_e G_e: the L1 norm of the gates, heavier on experts that are used more (Wang 2024, ReMoE,
    arXiv:2412.14711, Eqs. 8-10).

    G_e is the mean gate of expert e over all tokens and f_e = load_e / (target * tokens), 1 / N when even, without
    gradient. The pressure is the coefficient of the layer's `ReLU` selection, which the rule `GateSparsity` moves; the
    weight in the recipe multiplies it, and is 1 in the paper.
    """

    def __call__(self, trace: Trace) -> Float[Tensor, ""]:
        """Raises: ValueError where the layer's router does not select with `ReLU`."""
        layer: Any = trace.layer
        select = getattr(layer.router, "select", None)
        if not isinstance(select, ReLU):
            raise ValueError("gate_l1 needs gates that may be zero; allowed: select: {kind: relu, ...}")
        gates = require_logits(trace.routing, "gate_l1").relu()
        fraction, mean = shares(trace, trace.routing.load(), gates)
        return select.pressure.to(gates.dtype) * n_present(trace, "gate_l1") * (fraction / select.target * mean).sum()

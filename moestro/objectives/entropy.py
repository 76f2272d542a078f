"""How sure the router is."""

import math
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from moestro.objectives.balance import n_present, require_logits, token_mean
from moestro.routing import Trace


@dataclass(frozen=True)
class RouterEntropy:
    """Mean over tokens of H(P_t) = -sum_e P_te log P_te, in nats: minimising it makes top-p choose fewer experts.

    Wang 2024, arXiv:2408.10681, Eq. 5 prints N sum P log P, the opposite sign, which minimised drives top-p to as many
    experts as possible; `literal=True` gives exactly that, for archaeology. `scale_by_n` multiplies by the number of
    experts that take part, as the printed equation does.
    """

    scale_by_n: bool = False
    literal: bool = False

    def __call__(self, trace: Trace) -> Float[Tensor, ""]:
        log_p = require_logits(trace.routing, "router_entropy").log_softmax(-1)
        # experts that are not available: 0 log 0 = 0
        log_p = log_p.masked_fill(log_p == -math.inf, 0.0)
        entropy = token_mean(trace, -(log_p.exp() * log_p).sum())
        if self.literal:
            return -n_present(trace, "router_entropy") * entropy
        return n_present(trace, "router_entropy") * entropy if self.scale_by_n else entropy


@dataclass(frozen=True)
class RouterZLoss:
    """Mean over tokens of (log sum_e exp logit_te)^2: keeps logits small (Zoph 2022, arXiv:2202.08906, Eq. 5). Logits
    are what the router's score gives, whatever its gates are."""

    def __call__(self, trace: Trace) -> Float[Tensor, ""]:
        require_logits(trace.routing, "router_z_loss")
        logits: Any = trace.routing.raw_logits()
        return token_mean(trace, logits.logsumexp(-1).square().sum())

"""Balance of first choices."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from moestro.objectives.balance import n_present, require_logits, shares
from moestro.routing import Trace


@dataclass(frozen=True)
class FirstChoiceBalance:
    """N sum_e f_e P_e, f_e the fraction of tokens whose most probable expert is e, whatever else they use: 1 at perfect
    balance for every number of experts a token (Lepikhin 2020, arXiv:2006.16668, Algorithm 1; the loss of XMoE,
    arXiv:2403.18926). A capacity that drops rows changes nothing here. N are the experts that take part."""

    def __call__(self, trace: Trace) -> Float[Tensor, ""]:
        logits = require_logits(trace.routing, "first_choice_balance")
        first = torch.bincount(logits.argmax(-1), minlength=logits.shape[1])
        fraction, probability = shares(trace, first, logits.softmax(-1))
        return n_present(trace, "first_choice_balance") * (fraction * probability).sum()

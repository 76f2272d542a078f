"""Who gets how many tokens, and how wide an expert serves them."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from moestro.routing import Routing, Trace


def require_logits(routing: Routing, objective: str) -> Float[Tensor, "t e"]:
    """The logits of every expert.

    Raises: ValueError where the router has none (product keys), naming the objective.
    """
    if routing.logits is None:
        raise ValueError(f"{objective} needs a logit for every expert, which product keys do not have")
    return routing.logits


def traffic(trace: Trace, objective: str) -> tuple[Float[Tensor, "e"], Float[Tensor, "e"]]:
    """(f, P): the fraction of tokens that use each expert, no gradient; and its mean probability over the tokens
    (softmax over all experts). Both are zero for a batch without tokens."""
    logits = require_logits(trace.routing, objective)
    tokens = max(1, trace.routing.n_tokens)
    fraction = trace.routing.load().to(logits.dtype) / tokens
    return fraction, logits.softmax(-1).sum(0) / tokens


@dataclass(frozen=True)
class LoadBalance:
    """N sum_e f_e P_e (Wang 2024, arXiv:2408.10681, Eq. 3; after Fedus 2021).

    f_e is the fraction of tokens that use expert e and P_e its mean probability. As in the paper f is not divided by
    k: perfectly even top-k routing gives k, not 1.
    """

    def __call__(self, trace: Trace) -> Float[Tensor, ""]:
        fraction, probability = traffic(trace, "load_balance")
        return trace.routing.n_experts * (fraction * probability).sum()


@dataclass(frozen=True)
class ParameterPenalty:
    """N sum_e f_e h_e P_e: pushes tokens towards narrow experts (Wang 2024, arXiv:2408.10681, Eq. 4).

    h_e is the width of expert e divided by the `mean` (default), `max` or `sum` of the widths, or by nothing (`none`,
    the printed equation, whose value at the paper's sizes is in the thousands; the paper's own remark that the penalty
    equals the load-balance loss for equal sizes holds for `mean` only). Balances f_e h_e, the compute each expert does.
    """

    normalize: Literal["mean", "max", "sum", "none"] = "mean"

    def __post_init__(self) -> None:
        if self.normalize not in ("mean", "max", "sum", "none"):
            raise ValueError(f"normalize={self.normalize!r}, allowed: mean, max, sum, none")

    def __call__(self, trace: Trace) -> Float[Tensor, ""]:
        fraction, probability = traffic(trace, "parameter_penalty")
        widths = trace.layer.expert_widths()
        if not isinstance(widths, Tensor):
            widths = torch.full_like(fraction, widths)
        scale = {"mean": widths.mean, "max": widths.max, "sum": widths.sum, "none": lambda: 1.0}[self.normalize]()
        return trace.routing.n_experts * (fraction * (widths / scale).to(fraction) * probability).sum()

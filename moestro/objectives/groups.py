"""Losses over groups of experts of one width (MoHGE)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from moestro.objectives.balance import Statistics, check_statistics, require_logits, traffic
from moestro.routing import Trace, present


def by_width(trace: Trace, objective: str) -> tuple[Float[Tensor, "g e"], Float[Tensor, "g"]]:
    """(1 for each group's experts, 0 elsewhere; the groups' widths): those of one width that take part are a group."""
    logits = require_logits(trace.routing, objective)
    there = present(logits)
    widths = torch.as_tensor(trace.layer.expert_widths()).to(logits).expand(len(there))
    each = widths[there].unique()
    return ((widths == each[:, None]) & there).to(logits.dtype), each


@dataclass(frozen=True)
class GroupPenalty:
    """G sum_g f_g c_g P_g over the G groups of experts of one width: pushes tokens towards groups of narrow experts.

    f_g is the fraction of rows that group g computes, P_g its probability (mean over tokens, softmax over all experts),
    c_g its width divided by the mean over groups. The group-wise loss of MoHGE (arXiv:2604.23108) in the form of HMoE's
    parameter penalty: what is public of the paper says what the loss does and not its equation.
    """

    statistics: Statistics = "micro_batch"

    def __post_init__(self) -> None:
        check_statistics(self.statistics)

    def __call__(self, trace: Trace) -> Float[Tensor, ""]:
        fraction, probability = traffic(trace, "group_penalty", self.statistics)
        member, widths = by_width(trace, "group_penalty")
        rows, chances = member @ fraction, member @ probability
        shares = rows / rows.sum().clamp(min=1e-9)
        return len(widths) * (shares * (widths / widths.mean()) * chances).sum()


@dataclass(frozen=True)
class IntraGroupBalance:
    """Mean over groups of N_g sum_{e in g} f_e P_e, f and P divided by their sums over the group: 1 where each group
    spreads its rows evenly over its experts, whatever its share of all rows; 0 for a group without rows.

    The intra-group loss of MoHGE (arXiv:2604.23108), a load balance inside every group of experts of one width; the
    equation is ours, as for `GroupPenalty`. Statistics are those of each micro-batch: shares of a part do not add up to
    those of the whole.
    """

    def __call__(self, trace: Trace) -> Float[Tensor, ""]:
        fraction, probability = traffic(trace, "intra_group_balance")
        member, widths = by_width(trace, "intra_group_balance")
        tiny = torch.finfo(fraction.dtype).tiny
        shares = member * fraction / (member @ fraction).clamp(min=tiny)[:, None]
        means = member * probability / (member @ probability).clamp(min=tiny)[:, None]
        return (member.sum(1) * (shares * means).sum(1)).sum() / max(1, len(widths))

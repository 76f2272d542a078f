"""Steering by what was retrieved, where no matrix of logits exists."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from moestro.routing import SparseRouting, Trace, present


@dataclass(frozen=True)
class RetrievedParameterPenalty:
    """sum over the widths c of (N / n_c) (c / w) F_c P_c: pushes tokens towards narrow experts among those retrieved.

    n_c of the N experts that take part have width c, w is their mean width, F_c the share of the batch's rows that go
    to experts of width c (no gradient), and P_c those experts' share of the sum of all gates. It is `ParameterPenalty`
    (Wang 2024, arXiv:2408.10681, Eq. 4) divided by the rows of a token, with gates in place of the probabilities that
    product keys do not have, and with an even spread inside each width assumed: no batch can tell the load of one in a
    million. Where all experts have different widths and every token has all of them, the two are the same. Even use
    gives 1, and at its fixed point each expert's load is in proportion to 1 / width.

    Gradient: with G the sum of all gates, d/dg of a row of width c is ((N c) / (n_c w) F_c - the penalty) / G, and
    through the softmax of a head, d/ds_j = g_j (a_j - sum_i g_i a_i) with a these: scores of experts whose width has
    more than its share of compute fall and the others' rise. Experts that were not retrieved have no gradient of their
    own; their sub-keys, which others share, do.

    Raises: ValueError for routings without a choice (soft, slots).
    """

    def __call__(self, trace: Trace) -> Float[Tensor, ""]:
        routing = trace.routing
        if not isinstance(routing, SparseRouting):
            raise ValueError(f"retrieved_parameter_penalty needs chosen experts, {type(routing).__name__} has none")
        gates = routing.weight
        widths = torch.as_tensor(trace.layer.expert_widths()).to(gates.device).long().expand(routing.n_experts)
        chosen = widths[routing.expert]
        tiny, pool = torch.finfo(gates.dtype).tiny, torch.bincount(widths).to(gates.dtype)
        own = torch.stack(
            [torch.zeros_like(pool).index_add(0, chosen, each) for each in (torch.ones_like(gates), gates)]
        )
        rows, share = trace.summed(own)
        rows, share = rows.detach() / rows.detach().sum().clamp(min=1), share / share.sum().clamp(min=tiny)
        if routing.logits is not None:
            pool = torch.bincount(widths[present(routing.logits)], minlength=len(pool)).to(pool)
        each = torch.arange(len(pool), device=gates.device, dtype=gates.dtype)
        # (N / n_c) (c / w), where N times w is the sum of all widths
        weight = pool.sum() ** 2 * each / (pool.clamp(min=1) * (pool @ each).clamp(min=tiny))
        return (weight * rows * share).sum()

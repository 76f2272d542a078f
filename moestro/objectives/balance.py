"""Who gets how many tokens, and how wide an expert serves them."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from moestro.routing import Routing, Trace, present


def require_logits(routing: Routing, objective: str) -> Float[Tensor, "t e"]:
    """The logits of every expert.

    Raises: ValueError where the router has none (product keys), naming the objective.
    """
    if routing.logits is None:
        raise ValueError(f"{objective} needs a logit for every expert, which product keys do not have")
    return routing.logits


def n_present(trace: Trace, objective: str) -> Float[Tensor, ""]:
    """How many experts take part."""
    logits = require_logits(trace.routing, objective)
    return present(logits).sum().to(logits.dtype)


Statistics = Literal["micro_batch", "step"]


def traffic(
    trace: Trace, objective: str, statistics: Statistics = "micro_batch"
) -> tuple[Float[Tensor, "e"], Float[Tensor, "e"]]:
    """(f, P): the fraction of tokens that chose each expert, no gradient, whether or not a capacity dropped their rows;
    and its mean probability over the tokens (softmax over all experts). Both are zero for a batch without tokens.

    Where several processes share the micro-batch, it is that of all of them. With the statistics of the whole `step`, f
    is that of all its micro-batches, and this one's P is weighted by its tokens, so that the mean over micro-batches
    and processes is the value of the step as one batch. A trace that is not part of a larger step is one.
    """
    logits = require_logits(trace.routing, objective)
    if statistics == "step" and trace.step is not None:
        tokens, times = max(1.0, float(trace.step.n_tokens)), trace.step.micro_batches
        return trace.step.load.to(logits.dtype) / tokens, logits.softmax(-1).sum(0) / (tokens / times)
    return shares(trace, trace.routing.as_wanted().load(), logits.softmax(-1))


def shares(
    trace: Trace, load: Float[Tensor, "e"], each: Float[Tensor, "t e"]
) -> tuple[Float[Tensor, "e"], Float[Tensor, "e"]]:
    """(f, P) of a micro-batch, of all processes that share it: `load` and what `each` token gives, over its tokens."""
    fraction, mean = over_tokens(trace, load.to(each.dtype), each.sum(0))
    return fraction.detach(), mean


def over_tokens(trace: Trace, *sums: Float[Tensor, "_"]) -> list[Float[Tensor, "_"]]:
    """Sums over a micro-batch's tokens divided by their number, both of all processes that share it."""
    tokens = sums[0].new_tensor([trace.routing.n_tokens])
    *found, total = trace.summed(torch.cat([*sums, tokens])).split([*map(len, sums), 1])
    return [each / total.detach().clamp(min=1) for each in found]


def token_mean(trace: Trace, total: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """`over_tokens` of one number."""
    return over_tokens(trace, total[None])[0].squeeze(0)


def check_statistics(statistics: str) -> None:
    """Raises: ValueError for any other word."""
    if statistics not in ("micro_batch", "step"):
        raise ValueError(f"statistics={statistics!r}, allowed: micro_batch, step")


@dataclass(frozen=True)
class LoadBalance:
    """N sum_e f_e P_e (Wang 2024, arXiv:2408.10681, Eq. 3; after Fedus 2021).

    f_e is the fraction of tokens that choose expert e, P_e its mean probability, N the experts that take part. Rows
    that a capacity drops count, as in Switch and in MoEC's code: an expert that is asked too much must not look less
    so. As in the paper f is not divided by k: perfectly even top-k routing gives k, not 1. f is that of each
    micro-batch, or of the whole optimizer step (Qiu 2025, arXiv:2501.11873), which costs a forward pass more where
    gradients are accumulated.
    """

    statistics: Statistics = "micro_batch"

    def __post_init__(self) -> None:
        check_statistics(self.statistics)

    def __call__(self, trace: Trace) -> Float[Tensor, ""]:
        fraction, probability = traffic(trace, "load_balance", self.statistics)
        return n_present(trace, "load_balance") * (fraction * probability).sum()


@dataclass(frozen=True)
class WeightedBalance:
    """N sum_e eta_e f_e P_e with eta_e = 1 for experts that compute and `zero_compute` for those of width 0 (zero, copy
    and constant experts): below 1 they get more tokens (Jin 2024, MoE++, arXiv:2410.07348, its heterogeneous
    load-balance loss; tau). f, P and the factor N as in `LoadBalance`; the paper's loss has no N.
    """

    zero_compute: float = 0.75
    statistics: Statistics = "micro_batch"

    def __post_init__(self) -> None:
        check_statistics(self.statistics)
        if not self.zero_compute > 0:
            raise ValueError(f"zero_compute={self.zero_compute}, allowed: above 0")

    def __call__(self, trace: Trace) -> Float[Tensor, ""]:
        fraction, probability = traffic(trace, "weighted_balance", self.statistics)
        widths = torch.as_tensor(trace.layer.expert_widths()).to(fraction.device)
        eta = torch.ones_like(fraction).masked_fill(widths == 0, self.zero_compute)
        return n_present(trace, "weighted_balance") * (eta * fraction * probability).sum()


@dataclass(frozen=True)
class ParameterPenalty:
    """N sum_e f_e h_e P_e: pushes tokens towards narrow experts (Wang 2024, arXiv:2408.10681, Eq. 4).

    h_e is the width of expert e divided by the `mean` (default), `max` or `sum` of the widths, or by nothing (`none`,
    the printed equation, whose value at the paper's sizes is in the thousands; the paper's own remark that the penalty
    equals the load-balance loss for equal sizes holds for `mean` only). Balances f_e h_e, the compute each expert does.
    N and the widths are those of the experts that take part. `statistics` as for `LoadBalance`; the paper does not say.
    """

    normalize: Literal["mean", "max", "sum", "none"] = "mean"
    statistics: Statistics = "micro_batch"

    def __post_init__(self) -> None:
        check_statistics(self.statistics)
        if self.normalize not in ("mean", "max", "sum", "none"):
            raise ValueError(f"normalize={self.normalize!r}, allowed: mean, max, sum, none")

    def __call__(self, trace: Trace) -> Float[Tensor, ""]:
        fraction, probability = traffic(trace, "parameter_penalty", self.statistics)
        count = n_present(trace, "parameter_penalty")
        there = present(require_logits(trace.routing, "parameter_penalty"))
        widths = torch.as_tensor(trace.layer.expert_widths()).to(fraction) * there
        total = widths.sum()
        scale = {"mean": total / count.clamp(min=1), "max": widths.max(), "sum": total, "none": torch.ones_like(total)}
        tiny = torch.finfo(widths.dtype).tiny
        return count * (fraction * (widths / scale[self.normalize].clamp(min=tiny)) * probability).sum()

"""What all micro-batches of a step route together, for objectives that ask for the statistics of the whole step."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moestro.data import Batch
from moestro.evaluate.scoring import exact_dtype, score
from moestro.routing import StepTraffic, Trace
from moestro.train.pooling import n_ranks, several_ranks, summed_over_ranks


def asks_for_step(objective: Any) -> bool:
    """Whether an objective needs the traffic of the whole optimizer step."""
    return getattr(objective, "statistics", None) == "step"


@torch.no_grad()
def step_traffic(model: nn.Module, parts: Sequence[Batch], precision: str) -> tuple[list[StepTraffic], list[Any]]:
    """The traffic of every trace's layer over all micro-batches, and the forward cost of finding it out.

    Over several ranks, which all must call it and have as many micro-batches, it is the traffic of all of them: where
    gradients are averaged over ranks, objectives then are those of the step as one batch.

    One forward pass more: a micro-batch's loss cannot know how later ones will be routed, and keeping the graphs of all
    until then would undo what accumulation is for.
    """
    loads: list[Tensor] = []
    tokens: list[int] = []
    costs: list[Any] = []
    for part in parts:
        output, _ = score(model, part, precision)
        exact = exact_dtype(part.tokens.device)
        new = [trace.routing.load().to(exact) for trace in output.traces]
        loads = [a + b for a, b in zip(loads, new, strict=True)] if loads else new
        counts = [trace.routing.n_tokens for trace in output.traces]
        tokens = [a + b for a, b in zip(tokens, counts, strict=True)] if tokens else counts
        costs.append(model.flops(*part.tokens.shape, output.traces).computed)  # type: ignore[operator]
    if not several_ranks():
        return [StepTraffic(load, n, len(parts)) for load, n in zip(loads, tokens, strict=True)], costs
    of_all = [summed_over_ranks(torch.cat([load, load.new_tensor([n])])) for load, n in zip(loads, tokens, strict=True)]
    return [StepTraffic(total[:-1], int(total[-1]), len(parts) * n_ranks()) for total in of_all], costs


def of_step(traces: Sequence[Trace], traffic: Sequence[StepTraffic]) -> tuple[Trace, ...]:
    """The traces of one micro-batch, each knowing its step's traffic."""
    return tuple(replace(trace, step=step) for trace, step in zip(traces, traffic, strict=True))

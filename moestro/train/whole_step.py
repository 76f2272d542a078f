"""What all micro-batches of a step route together, for objectives that ask for the statistics of the whole step."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moestro.data import Batch
from moestro.evaluate.scoring import exact_dtype, score
from moestro.parallel.collectives import summed
from moestro.parallel.sums import n_ranks, several_ranks, summed_over_ranks
from moestro.routing import StepTraffic, Trace


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
    totals: list[Tensor] = []
    costs: list[Any] = []
    for part in parts:
        output, _ = score(model, part, precision)
        new = [_counts(trace) for trace in output.traces]
        totals = [a + b for a, b in zip(totals, new, strict=True)] if totals else new
        costs.append(model.flops(*part.tokens.shape, output.traces).computed)  # type: ignore[operator]
    if several_ranks():
        totals = [summed_over_ranks(total) for total in totals]
    tokens = torch.stack([total[-2:] for total in totals]).tolist()
    times = len(parts) * n_ranks()
    return [
        StepTraffic(total[:-2], int(n), times, int(paired)) for total, (n, paired) in zip(totals, tokens, strict=True)
    ], costs


def _counts(trace: Trace) -> Tensor:
    """Rows that tokens chose of every expert, tokens, and tokens on which two experts or more were recorded."""
    paired = (trace.recorded_per_token() >= 2).sum()
    load = trace.routing.as_wanted().load().to(exact_dtype(trace.x.device))
    return torch.cat([load, load.new_tensor([trace.routing.n_tokens]), paired.to(load)[None]])


def of_step(traces: Sequence[Trace], traffic: Sequence[StepTraffic]) -> tuple[Trace, ...]:
    """The traces of one micro-batch, each knowing its step's traffic."""
    return tuple(replace(trace, step=step) for trace, step in zip(traces, traffic, strict=True))


def of_everyone(traces: Sequence[Trace]) -> tuple[Trace, ...]:
    """The traces of one rank's share of a micro-batch, each able to sum over all ranks."""
    return tuple(replace(trace, everyone=summed) for trace in traces)

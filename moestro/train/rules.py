"""Rules: the only things besides the optimizer that change a model, between steps, from what traces showed."""

from typing import Any, Protocol

import torch
from torch import Tensor

from moestro.routing import Trace


class Rule(Protocol):
    """Watches the traces of a step's micro-batches, then changes the model once, after the optimizer step.

    What a rule remembers from one step to the next is in `state_dict`: nested dicts, lists, numbers, strings and
    tensors. Checkpoints are written between steps, so what it gathers within one step need not be.
    """

    def observe(self, trace: Trace) -> None:
        """Take note of one layer's forward in one training micro-batch."""
        ...

    def apply(self, step: int) -> None:
        """Change the model after optimizer step `step` (the first is 1)."""
        ...

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...


class QueryNormStatistics:
    """Moves the running statistics of batch-normalised routers to those of the step's whole batch, once a step.

    Micro-batches of n_i queries with mean m_i and variance v_i pool to m = sum n_i m_i / n and
    v = sum n_i (v_i + m_i^2) / n - m^2, the statistics of the batch had it been one, whatever the accumulation.
    """

    def __init__(self, momentum: float = 0.1) -> None:
        if not 0 < momentum <= 1:
            raise ValueError(f"query norm momentum={momentum}: allowed is above 0, at most 1")
        self.momentum = momentum
        self.seen: dict[Any, list[tuple[Tensor, Tensor, int]]] = {}

    def observe(self, trace: Trace) -> None:
        stats = getattr(trace.routing, "query_stats", None)
        if stats is not None:
            self.seen.setdefault(trace.layer, []).append(stats)

    def apply(self, step: int) -> None:
        for layer, batches in self.seen.items():
            layer.router.query_norm.update(*pooled(batches), self.momentum)
        self.seen.clear()

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        if state:
            raise ValueError(f"QueryNormStatistics keeps no state, got {sorted(state)}")


@torch.no_grad()
def pooled(batches: list[tuple[Tensor, Tensor, int]]) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance of several samples together, from (mean, variance, count) of each."""
    if len(batches) == 1:
        return batches[0][:2]
    means = torch.stack([mean.double() for mean, _, _ in batches])
    variances = torch.stack([variance.double() for _, variance, _ in batches])
    share = torch.tensor([count for _, _, count in batches], dtype=torch.float64, device=means.device)[:, None]
    share = share / share.sum()
    mean = (share * means).sum(0)
    return mean, (share * (variances + (means - mean) ** 2)).sum(0)

"""`GateSparsity`: steers gates that may be zero to a mean number of experts."""

from typing import Any

import torch

from moestro.parallel.sums import summed_over_ranks
from moestro.routers import ReLU
from moestro.routing import Trace
from moestro.train.rules import Rule


class GateSparsity(Rule):
    """After every optimizer step the pressure on all `ReLU` selections is multiplied by `factor` where gates were less
    sparse than their target, divided by it where not (Wang 2024, ReMoE, arXiv:2412.14711, Eq. 9).

    Sparsity is the share of gates that are zero, averaged over layers, of the step's whole batch on all ranks; its
    target is 1 - target / N. One pressure for all layers. What it learned is in the model's buffers.
    """

    def __init__(self, factor: float = 1.2) -> None:
        if not factor > 1:
            raise ValueError(f"gate sparsity factor={factor}, allowed: above 1")
        self.factor = factor
        self.seen: dict[ReLU, list[Any]] = {}

    def observe(self, trace: Trace) -> None:
        layer: Any = trace.layer
        select = getattr(layer.router, "select", None)
        if isinstance(select, ReLU):
            rows, tokens, _ = self.seen.get(select, [0, 0, 0])
            self.seen[select] = [rows + trace.routing.n_rows, tokens + trace.routing.n_tokens, trace.routing.n_experts]

    @torch.no_grad()
    def apply(self, step: int) -> None:
        """Raises: ValueError where the model has no gates to steer."""
        if not self.seen:
            raise ValueError("gate sparsity found no gates that may be zero; allowed: select: {kind: relu, ...}")
        pressure = next(iter(self.seen)).pressure
        own = torch.tensor([figures[:2] for figures in self.seen.values()], dtype=torch.int64, device=pressure.device)
        rows, tokens = summed_over_ranks(own).cpu().double().unbind(1)
        target, n_experts = (
            torch.tensor([(select.target, n) for select, (_, _, n) in self.seen.items()]).double().unbind(1)
        )
        excess = ((rows / tokens.clamp(min=1) - target) / n_experts).sum()
        for select in self.seen:
            select.pressure *= self.factor if excess > 0 else 1 / self.factor
        self.seen.clear()

    def skip(self, step: int) -> None:
        self.seen.clear()

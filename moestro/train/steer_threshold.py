"""`SteerThreshold`: as many experts a token as asked for, by moving top-p's threshold."""

import torch
from torch import Tensor, nn

from moestro.evaluate.scoring import exact_dtype
from moestro.layers import MoELayer
from moestro.parallel.sums import summed_over_ranks
from moestro.routers import SteeredTopP
from moestro.routing import Trace
from moestro.train.optim import Optimizers
from moestro.train.rules import Rule


class SteerThreshold(Rule):
    """Moves the thresholds of all `SteeredTopP` so that a token has `target` experts in the mean over layers.

    A proportional-integral controller in its incremental form: after step n, with e_n = (target - mean k of step n) /
    mean number of experts, p += proportional * (e_n - e_{n-1}) + integral * e_n, then p is kept within 0 and 1. The sum
    of errors is in p itself, so that it cannot wind up at a limit. All layers move alike: one constant for the whole
    model where they start alike, as the threshold of Huang 2024 (arXiv:2403.07652) is; steering it is ours, after the
    controller that DTop-p (arXiv:2512.13996) describes.

    Mean k is that of the step's whole batch: all micro-batches, all ranks of `torch.distributed`. Evaluation and
    recomputation do not count.

    Raises: ValueError for impossible values; on `start` where nothing can be steered or no layer has `target` experts.
    """

    def __init__(self, target: float, proportional: float = 0.1, integral: float = 0.02) -> None:
        if not target >= 1:
            raise ValueError(f"steer threshold target={target} experts a token, allowed: at least 1")
        if proportional < 0 or not integral > 0:
            raise ValueError(
                f"steer threshold proportional={proportional}, integral={integral}, allowed: at least 0, above 0"
            )
        self.target, self.proportional, self.integral = target, proportional, integral
        self.error: float | None = None
        self.selects: list[SteeredTopP] = []
        self.layers: set[MoELayer] = set()
        self.counts: Tensor | None = None

    def start(self, model: nn.Module, optimizer: Optimizers) -> None:
        self.selects = [module for module in model.modules() if isinstance(module, SteeredTopP)]
        mixtures = [module for module in model.modules() if isinstance(module, MoELayer)]
        self.layers = {layer for layer in mixtures if set(layer.router.modules()) & set(self.selects)}
        if not self.layers:
            raise ValueError("steer threshold found nothing to steer; allowed: select: {kind: steered_top_p, ...}")
        if self.target > max(layer.bank.n_experts for layer in self.layers):
            raise ValueError(f"steer threshold target={self.target}: no layer has so many experts")

    def observe(self, trace: Trace) -> None:
        if trace.layer not in self.layers:
            return
        routing = trace.routing
        tokens, experts = routing.n_tokens, routing.n_tokens * routing.n_experts
        seen = torch.tensor([routing.n_rows, tokens, experts], dtype=exact_dtype(trace.x.device), device=trace.x.device)
        self.counts = seen if self.counts is None else self.counts + seen

    def apply(self, step: int) -> None:
        if self.counts is None:
            raise ValueError(f"steer threshold: no layer that is steered was used in step {step}")
        rows, tokens, experts = summed_over_ranks(self.counts).tolist()
        self.counts = None
        error = (self.target * tokens - rows) / max(1.0, experts)
        before = error if self.error is None else self.error
        change = self.proportional * (error - before) + self.integral * error
        for select in self.selects:
            select.threshold = min(1.0, max(0.0, select.threshold + change))
        self.error = error

    def skip(self, step: int) -> None:
        self.counts = None

    def state_dict(self) -> dict:
        return {"error": self.error}

    def load_state_dict(self, state: dict) -> None:
        self.error = state["error"]

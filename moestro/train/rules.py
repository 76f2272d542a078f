"""Rules: the only things besides the optimizer that change a model or its gradients, between steps."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from moestro.evaluate.scoring import exact_dtype
from moestro.parallel.sums import several_ranks, summed_over_ranks
from moestro.routers import BiasedRouter
from moestro.routers.query_norm import BatchQueryNorm
from moestro.routing import Trace
from moestro.train.optim import Optimizers
from moestro.train.pooling import Sample, pooled, pooled_over_ranks


class Rule:
    """Watches the traces of a step's micro-batches, then changes the model once, after the optimizer step.

    What a rule remembers from one step to the next is in `state_dict`: nested dicts, lists, numbers, strings and
    tensors; by default it remembers nothing. Checkpoints are written between steps, so what it gathers within one step
    need not be there.
    """

    def start(self, model: nn.Module, optimizer: Optimizers) -> None:
        """Get to know the model and its optimizer, once, before the first step and before `load_state_dict`. A rule
        that gives new values to weights makes `optimizer` forget the old ones' moments with `reset_rows`."""

    def observe(self, trace: Trace) -> None:
        """Take note of one layer's forward in one training micro-batch."""

    def gradients(self, step: int) -> None:
        """Change the gradients of optimizer step `step` (the first is 1): all micro-batches are in them, nothing is
        clipped yet. The same on every rank."""

    def apply(self, step: int) -> None:
        """Change the model after optimizer step `step`."""

    def skip(self, step: int) -> None:
        """In place of `apply` after a step that was not finite and changed nothing: forget what its traces showed."""

    def state_dict(self) -> dict:
        """What it must know to go on."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Go on from `state`.

        Raises: ValueError where the rule keeps none.
        """
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, got {sorted(state)}")


class QueryNormStatistics(Rule):
    """Moves the running statistics of batch-normalised routers to those of the step's whole batch, once a step.

    Micro-batches of n_i queries with mean m_i and variance v_i pool to m = sum n_i m_i / n and
    v = sum n_i (v_i + (m_i - m)^2) / n, the statistics of the batch had it been one, whatever the accumulation. Where
    `torch.distributed` is initialised, the sums run over all its ranks, too, and all keep the same running statistics.

    What is normalised with what: in training a query with the mean and variance of its micro-batch, over all ranks
    where `parallel` lets them (`BatchQueryNorm.together`), else of its own rank, padding left out; in evaluation with
    the running statistics, which know all micro-batches of all ranks.
    """

    def __init__(self, momentum: float = 0.1) -> None:
        if not 0 < momentum <= 1:
            raise ValueError(f"query norm momentum={momentum}: allowed is above 0, at most 1")
        self.momentum = momentum
        self.seen: dict[Any, list[Sample]] = {}

    def observe(self, trace: Trace) -> None:
        layer: Any = trace.layer
        norm = getattr(layer.router, "query_norm", None)
        if isinstance(norm, BatchQueryNorm) and norm.training:
            stats = getattr(trace.routing, "query_stats", None)
            # a batch of nothing but padding has none, yet its rank takes part in what ranks do together
            self.seen.setdefault(layer, []).extend([] if stats is None else [stats])

    def apply(self, step: int) -> None:
        for layer, batches in self.seen.items():
            norm = layer.router.query_norm
            together = pooled_over_ranks(batches, norm.mean) if several_ranks() else pooled(batches)
            if together is not None:
                norm.update(*together, self.momentum)
        self.seen.clear()

    def skip(self, step: int) -> None:
        self.seen.clear()


class BiasBalance(Rule):
    """Balances experts without a loss: after every optimizer step, bias_e += rate * sign(mean load - load_e) in every
    layer with a `BiasedRouter` (Wang 2024, arXiv:2408.15664, Algorithm 1; its rate is the default).

    The load is that of the step's whole batch, whatever the accumulation, on all ranks of `torch.distributed`: rows of
    every expert (`tokens`), or rows times width (`compute`, for experts of different widths: wide ones get fewer
    tokens). Only training micro-batches are observed, each once: neither evaluation nor recomputation counts. What it
    learned is in the model's buffers.
    """

    def __init__(self, rate: float = 0.001, balances: Literal["tokens", "compute"] = "tokens") -> None:
        if not rate > 0:
            raise ValueError(f"bias balance rate={rate}, allowed: above 0")
        if balances not in ("tokens", "compute"):
            raise ValueError(f"balances={balances!r}, allowed: tokens, compute")
        self.rate, self.balances = rate, balances
        self.seen: dict[Any, Tensor] = {}

    def observe(self, trace: Trace) -> None:
        """Raises: ValueError where compute is to be balanced over an expert that costs none."""
        layer: Any = trace.layer
        if not isinstance(layer.router, BiasedRouter):
            return
        load = trace.routing.load().to(exact_dtype(trace.x.device))
        if self.balances == "compute":
            widths = torch.as_tensor(layer.expert_widths()).to(load)
            if not bool((widths > 0).all()):
                raise ValueError("bias balance of compute: an expert of width 0 never has any; balances: tokens can")
            load = load * widths
        self.seen[layer] = self.seen[layer] + load if layer in self.seen else load

    @torch.no_grad()
    def apply(self, step: int) -> None:
        """Raises: ValueError where the model has no layer to balance."""
        if not self.seen:
            raise ValueError("bias balance found no router with a bias; allowed: router: {kind: biased, ...}")
        for layer, load in self.seen.items():
            load = summed_over_ranks(load)
            layer.router.bias += self.rate * (load.mean() - load).sign().to(layer.router.bias.dtype)
        self.seen.clear()

    def skip(self, step: int) -> None:
        self.seen.clear()

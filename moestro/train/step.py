"""One optimizer step's forward and backward passes over its micro-batches, and what they measured."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moestro.data import Batch
from moestro.evaluate.scoring import exact_dtype, score, told
from moestro.objectives import Objective
from moestro.parallel.sums import n_ranks
from moestro.routing import Trace
from moestro.train.rules import Rule
from moestro.train.schedules import Scheduled
from moestro.train.settings import TrainSettings
from moestro.train.whole_step import asks_for_step, of_step, step_traffic

WeightedObjectives = Sequence[tuple[str, float, Objective]]
ScheduledObjectives = Sequence[tuple[str, float | Scheduled, Objective]]
Sums = dict[str, Tensor]


class Batches(Protocol):
    """What training asks of a data set: batches that are pure functions of their arguments, and what identifies it."""

    @property
    def fingerprint(self) -> str: ...

    def train_batch(self, step: int, batch_size: int, seed: int) -> Batch: ...

    def val_batches(self, batch_size: int, max_tokens: int | None = None) -> Iterable[Batch]: ...


@dataclass(frozen=True)
class Measured:
    """One optimizer step in plain numbers. `loss` is nats per target token, `total_loss` adds the weighted objectives
    (each the mean over layers and micro-batches); FLOPs are of training: forward and backward."""

    loss: float
    total_loss: float
    objectives: dict[str, float]
    grad_norm: float
    flops: float
    flops_computed: float
    active_params: float
    tokens: int
    bytes: int

    @property
    def signs_of_health(self) -> dict[str, float]:
        """What must be finite before the optimizer may use the gradients."""
        return {"loss": self.loss, **self.objectives, "gradient norm": self.grad_norm}

    @property
    def bpb(self) -> float:
        """Bits per byte of the step's text."""
        return self.loss * self.tokens / self.bytes / math.log(2)


def backward(
    model: nn.Module,
    batch: Batch,
    settings: TrainSettings,
    objectives: WeightedObjectives,
    rules: Sequence[Rule],
) -> Sums:
    """Add to every gradient d(loss)/d(parameter) of the step's loss: nats averaged over all its target tokens, plus
    the weighted objectives (each the mean over layers and micro-batches). Sums stay on the device."""
    device = next(model.parameters()).device
    n_targets = count_targets(batch)
    size = settings.micro_batch
    sums: Sums = {}
    parts = [batch.rows(start, start + size) for start in range(0, settings.batch_size, size)]
    foreseen = None
    if len(parts) * n_ranks() > 1 and any(asks_for_step(objective) for _, _, objective in objectives):
        foreseen, costs = step_traffic(model, parts, settings.precision)
        add(sums, device, flops_computed=sum(costs))
    for part in parts:
        # backward may compute forward again
        with told(model, part):
            output, losses = score(model, part, settings.precision)
            loss = losses.sum() / n_targets
            traces = output.traces if foreseen is None else of_step(output.traces, foreseen)
            values = {name: mean_over_layers(name, objective, traces) for name, _, objective in objectives}
            penalty = sum(weight * values[name] for name, weight, _ in objectives) / settings.accumulate
            (loss + penalty).backward()
        for rule in rules:
            for trace in output.traces:
                rule.observe(trace)
        add(sums, device, loss=loss, **{f"objective {k}": v / settings.accumulate for k, v in values.items()})
        add(sums, device, **usage(model, part, output.traces, settings))
    return sums


def usage(model: Any, batch: Batch, traces: tuple[Trace, ...], settings: TrainSettings) -> dict[str, Any]:
    """Training FLOPs of one micro-batch, and its share of the step's mean active parameters."""
    forward = model.flops(*batch.tokens.shape, traces)
    # Recomputation runs the forward of all but the head a second time; nothing useful comes of it.
    head = 2.0 * batch.tokens.numel() * model.head.weight.numel()
    again = forward.computed - head if settings.recompute else 0.0
    training = forward.training()
    return {
        "flops": training.useful,
        "flops_computed": training.computed + again,
        "active_params": model.active_parameters(traces) / settings.accumulate,
    }


def mean_over_layers(name: str, objective: Objective, traces: tuple[Trace, ...]) -> Float[Tensor, ""]:
    """The objective's mean over the layers that have traces, so that its weight means the same at every depth.

    Raises: ValueError where the model has no such layer.
    """
    if not traces:
        raise ValueError(f"objective {name!r} needs a mixture-of-experts layer, the model has none")
    return torch.stack([objective(trace) for trace in traces]).mean()


def count_targets(batch: Batch) -> int:
    """Target tokens of a batch.

    Raises: ValueError where it has none.
    """
    n_targets = int(batch.keep.sum())
    if not n_targets:
        raise ValueError("a training batch has no target tokens: the loss is not defined")
    return n_targets


def add(sums: Sums, device: torch.device, **values: Any) -> None:
    """Add detached values to the running sums, without waiting for the device."""
    for name, value in values.items():
        exact = torch.as_tensor(value).detach().to(device, exact_dtype(device), non_blocking=True)
        sums[name] = sums[name] + exact if name in sums else exact


def measure(sums: Sums, grad_norm: Tensor, batch: Batch, objectives: WeightedObjectives) -> Measured:
    """The step's sums as numbers, in one transfer: the only time a step waits for the device."""
    row = torch.stack([*sums.values(), grad_norm.to(next(iter(sums.values())).dtype)])
    numbers = dict(zip([*sums, "grad_norm"], row.tolist(), strict=True))
    values = {name: numbers.pop(f"objective {name}") for name, _, _ in objectives}
    total = numbers["loss"] + sum(weight * values[name] for name, weight, _ in objectives)
    return Measured(
        total_loss=total,
        objectives=values,
        tokens=count_targets(batch),
        bytes=int(batch.n_bytes.sum()),
        **numbers,
    )


def check_names(objectives: ScheduledObjectives) -> None:
    """Raises: ValueError where two objectives have one name."""
    names = [name for name, _, _ in objectives]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"objectives {names}: {sorted(twice)[0]!r} is there twice; names must differ")

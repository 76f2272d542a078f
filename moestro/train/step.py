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
from moestro.parallel.gradients import send_after_backward, sum_gradients
from moestro.parallel.layout import n_elsewhere
from moestro.parallel.ranks import Ranks
from moestro.parallel.sums import n_ranks
from moestro.routing import Trace
from moestro.train.rules import Rule
from moestro.train.schedules import Scheduled
from moestro.train.settings import TrainSettings
from moestro.train.whole_step import asks_for_step, of_everyone, of_step, step_traffic

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
    ranks: Ranks | None = None,
) -> Sums:
    """Add to every gradient d(loss)/d(parameter) of the step's loss: nats averaged over all its target tokens, plus
    the weighted objectives (each the mean over layers and micro-batches). Sums stay on the device.

    All ranks have the same batch; each computes its share of every micro-batch, which so is that of one process, and
    gradients are summed over ranks with the last one. The sums that are returned are those of one rank."""
    device = next(model.parameters()).device
    ranks = ranks or Ranks.alone(device)
    n_targets, n_parts = count_targets(batch), settings.accumulate * ranks.world
    sums: Sums = {}
    own, size = ranks.own_rows(settings.micro_batch), settings.micro_batch
    parts = [batch.rows(start + own.start, start + own.stop) for start in range(0, settings.batch_size, size)]
    foreseen = None
    if len(parts) * n_ranks() > 1 and any(asks_for_step(objective) for _, _, objective in objectives):
        foreseen, costs = step_traffic(model, parts, settings.precision)
        add(sums, device, flops_computed=sum(costs))
    for number, part in enumerate(parts, 1):
        send_after_backward(model, number == len(parts))
        # backward may compute forward again
        with told(model, part):
            output, losses = score(model, part, settings.precision)
            loss = losses.sum() / n_targets
            traces = output.traces if foreseen is None else of_step(output.traces, foreseen)
            traces = of_everyone(traces) if ranks.several else traces
            values = {name: mean_over_layers(name, objective, traces) for name, _, objective in objectives}
            penalty = sum(weight * values[name] for name, weight, _ in objectives) / n_parts
            (loss + penalty).backward()
        for rule in rules:
            for trace in output.traces:
                rule.observe(trace)
        add(sums, device, loss=loss, **{f"objective {k}": v / n_parts for k, v in values.items()})
        add(sums, device, **usage(model, part, output.traces, settings.recompute, n_parts))
    sum_gradients(model.parameters(), ranks)
    return sums


def usage(model: Any, batch: Batch, traces: tuple[Trace, ...], recompute: bool, n_parts: int) -> dict[str, Any]:
    """Training FLOPs of one micro-batch of `n_parts`, and its share of the step's mean active parameters."""
    forward = model.flops(*batch.tokens.shape, traces)
    # Recomputation runs the forward of all but the head a second time; nothing useful comes of it.
    head = 2.0 * batch.tokens.numel() * model.head.weight.numel()
    again = forward.computed - head if recompute else 0.0
    training = forward.training()
    return {
        "flops": training.useful,
        "flops_computed": training.computed + again,
        "active_params": (model.active_parameters(traces) + n_elsewhere(model.parameters())) / n_parts,
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


def measure(
    sums: Sums, grad_norm: Tensor, batch: Batch, objectives: WeightedObjectives, ranks: Ranks | None = None
) -> Measured:
    """The step's sums over all ranks as numbers, in one transfer: the only time a step waits for the device."""
    own = torch.stack(list(sums.values()))
    row = torch.cat([own if ranks is None else ranks.summed(own), grad_norm.to(own.dtype)[None]])
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

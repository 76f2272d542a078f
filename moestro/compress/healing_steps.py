"""The steps of healing: AdamW on what is learned, kept in a file so that an interrupted healing continues."""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from moestro.data import Batch
from moestro.evaluate.scoring import score
from moestro.formats.writer import write_tensors
from moestro.ops.whole_files import TEMPORARY, sync_file

Text = Callable[[int], Batch]
# batch, the model's output, nats of its targets -> what each token adds to the loss
TokenLoss = Callable[[Batch, Any, Tensor], Tensor]
# Seconds between two states on the disk.
EVERY = 60.0


class Schedule(Protocol):
    """Of `healing.Healing`: how many steps, the highest rate, the largest norm of a gradient."""

    @property
    def steps(self) -> int: ...

    @property
    def lr(self) -> float: ...

    @property
    def clip(self) -> float: ...


def steps_done(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    text: Text,
    schedule: Schedule,
    loss_of: TokenLoss,
    keep: Path | None = None,
) -> list[float]:
    """The loss of every step, a mean over the tokens that count; the model in the mode that it has. What `keep` holds
    of an earlier call is taken up, and it holds the last state afterwards.

    Raises: ValueError where `keep` is of other parameters.
    """
    optimizer = torch.optim.AdamW(parameters, lr=schedule.lr, weight_decay=0.0)
    losses = [] if keep is None or not keep.is_file() else _taken_up(optimizer, parameters, keep)
    saved = time.monotonic()
    for step in range(len(losses), schedule.steps):
        losses.append(_step(model, optimizer, text(step), rate(schedule, step), schedule.clip, loss_of))
        if keep is not None and (time.monotonic() - saved >= EVERY or step + 1 == schedule.steps):
            _save(optimizer, parameters, losses, keep)
            saved = time.monotonic()
    return losses


def rate(schedule: Schedule, step: int) -> float:
    """The learning rate of a step: rising over the first tenth, then falling to 0."""
    warm = max(1, schedule.steps // 10)
    return schedule.lr * min((step + 1) / warm, (schedule.steps - step) / max(1, schedule.steps - warm))


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, lr: float, clip: float, loss_of: TokenLoss
) -> float:
    for group in optimizer.param_groups:
        group["lr"] = lr
    # a tensor is put together once, however often the model asks for it
    with torch.enable_grad(), parametrize.cached():
        output, nats = score(model, batch, "fp32")
        values = loss_of(batch, output, nats)
        loss = values[batch.keep.to(values.device)].mean()
        loss.backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], clip)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def _save(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], losses: list[float], keep: Path) -> None:
    tensors = {"losses": torch.tensor(losses, dtype=torch.float64)}
    for place, parameter in enumerate(parameters):
        tensors[f"{place}/value"] = parameter.detach()
        tensors |= {f"{place}/{name}": value for name, value in optimizer.state[parameter].items()}
    half = keep.with_name(TEMPORARY + keep.name)
    write_tensors(half, tensors)
    sync_file(half)
    os.replace(half, keep)


def _taken_up(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], keep: Path) -> list[float]:
    stored = load_file(keep)
    losses = stored.pop("losses").tolist()
    entries: list[dict[str, Tensor]] = [{} for _ in parameters]
    for name, value in stored.items():
        place, _, entry = name.partition("/")
        if int(place) >= len(entries):
            raise ValueError(f"{keep} holds the healing of another model: remove it")
        entries[int(place)][entry] = value.clone()
    for parameter, found in zip(parameters, entries, strict=True):
        value = found.pop("value", torch.empty(0))
        if value.shape != parameter.shape:
            raise ValueError(f"{keep} holds the healing of another model: remove it")
        parameter.data.copy_(value)
        optimizer.state[parameter] = {
            name: entry if name == "step" else entry.to(parameter.device) for name, entry in found.items()
        }
    return losses

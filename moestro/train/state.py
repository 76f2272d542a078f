"""Everything that decides how training goes on, into a checkpoint and back."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moestro.model.active import total_parameters
from moestro.parallel.layout import n_elsewhere
from moestro.parallel.ranks import Ranks
from moestro.train.background import BackgroundWriter
from moestro.train.checkpoint import (
    CheckpointError,
    checkpoint_of,
    keep_checkpoints,
    read_model,
    read_state,
    read_tensors,
    write_checkpoint,
)
from moestro.train.counters import Counters
from moestro.train.folder import RunFolder
from moestro.train.optim import Optimizers
from moestro.train.parts import model_parts, optimizer_parts
from moestro.train.rules import Rule
from moestro.train.settings import TrainSettings
from moestro.train.tensors import (
    join,
    load_model,
    load_optimizer,
    model_tensors,
    optimizer_tensors,
    random_state,
    set_random_state,
    split,
)

# Settings that change what is written or shown, or when a run is given up, not what is learned until then.
FREE = frozenset(
    {"eval_every", "eval_tokens", "save_every", "keep_last", "keep_best", "tensorboard", "table_folder"}
    | {"non_finite", "spike", "most_skipped", "parallel", "check_memory"}
)


@dataclass
class TrainState:
    """Model, optimizer, rules and counters of a run. `same` holds what else must be the same when it is continued:
    {what: {name: value}}, JSON values. With several ranks every one of them has such a state, and calls `save` and
    `restore` with the others."""

    model: nn.Module
    optimizer: Optimizers
    rules: Sequence[Rule]
    settings: TrainSettings
    same: dict[str, dict[str, Any]]
    counters: Counters = field(default_factory=Counters)
    ranks: Ranks = field(default_factory=Ranks.alone)

    def __post_init__(self) -> None:
        self.writer = BackgroundWriter(self.ranks)

    def save(self, folder: RunFolder, metrics_bytes: int) -> Path:
        """Write a checkpoint and remove those that are no longer kept. With several ranks both happen while training
        goes on, until `writer.wait()`."""
        self.counters.metrics_bytes = metrics_bytes
        tensors, tied = model_tensors(self.model)
        files = {
            "model": tensors,
            "optimizer": optimizer_tensors(self.model, self.optimizer),
            "rules": {},
        }
        rules = [split(rule.state_dict(), str(index), files["rules"]) for index, rule in enumerate(self.rules)]
        state = {
            "counters": asdict(self.counters),
            "random": random_state(self._device),
            "rules": rules,
            "tied": tied,
            **self._fixed(),
        }
        best = self.counters.best_step if self.settings.keep_best else None
        keep = partial(keep_checkpoints, folder.checkpoints, self.settings.keep_last, best)
        if self.ranks.several:
            path = checkpoint_of(folder.checkpoints, self.counters.step)
            self.writer.write(path, files, state, keep)
            return path
        path = write_checkpoint(folder.checkpoints, self.counters.step, files, state)
        keep()
        return path

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint.

        Raises: CheckpointError where it is damaged, or was made with other data, settings, rules or another model.
        """
        state = self.require_same(path)
        if self.ranks.several:
            load_model(self.model, model_parts(self.model, path), state["tied"])
            load_optimizer(self.model, self.optimizer, optimizer_parts(self.model, path))
        else:
            load_model(self.model, read_model(path, model_tensors(self.model)[0]), state["tied"])
            load_optimizer(self.model, self.optimizer, read_tensors(path, "optimizer"))
        tensors = read_tensors(path, "rules")
        for rule, saved in zip(self.rules, state["rules"], strict=True):
            rule.load_state_dict(join(saved, tensors))
        set_random_state(state["random"], self._device)
        for entry in fields(Counters):
            # what a run from before an entry was counted has not counted is 0
            setattr(self.counters, entry.name, state["counters"].get(entry.name, entry.default))

    def require_same(self, path: Path) -> dict[str, Any]:
        """The content of a checkpoint's state.json, once it is shown to be of this run.

        Raises: CheckpointError where it is damaged, or was made with other data, settings, objectives or rules.
        """
        state = read_state(path, self.ranks)
        for name, value in self._fixed().items():
            require_equal(path, name, state[name], value)
        return state

    def result(self) -> dict[str, Any]:
        """The final metrics of the run."""
        counters = self.counters
        return {
            "step": counters.step,
            "tokens": counters.tokens,
            "flops": counters.flops,
            "flops_computed": counters.flops_computed,
            "params_total": total_parameters(self.model) + n_elsewhere(self.model.parameters()),
            "params_active": counters.active_params_sum / counters.step,
            "skipped": counters.skipped,
            "eval": counters.last_eval,
            "best": {"step": counters.best_step, "loss": counters.best_loss},
            "time": {"seconds": counters.seconds, "tokens_per_s": counters.tokens / counters.seconds},
        }

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _fixed(self) -> dict[str, Any]:
        """What must be the same when training goes on, as JSON values."""
        plain = {name: repr(value) for name, value in vars(self.settings).items() if name not in FREE | {"optim"}}
        optim = {f"optim.{name}": repr(value) for name, value in vars(self.settings.optim).items()}
        kinds = {str(index): type(rule).__name__ for index, rule in enumerate(self.rules)}
        return {**self.same, "settings": plain | optim, "rule_kinds": kinds}


def require_equal(path: Path, what: str, saved: dict, now: dict) -> None:
    """Raises: CheckpointError naming the first entries that differ."""
    differing = [
        f"{key} was {saved.get(key)}, now {now.get(key)}"
        for key in sorted(saved.keys() | now.keys())
        if saved.get(key) != now.get(key)
    ]
    if differing:
        raise CheckpointError(
            f"{path.name} was written with other {what}: {'; '.join(differing)}. Continue with the same, or train in "
            "another run folder"
        )

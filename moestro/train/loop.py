"""The training loop: every effect of a run, in the order in which it happens."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moestro.evaluate.perplexity import evaluate
from moestro.evaluate.scoring import check_precision
from moestro.model import Transformer
from moestro.parallel.ranks import Ranks, launched
from moestro.train.checkpoint import join_model, list_checkpoints
from moestro.train.environment import describe_machine
from moestro.train.folder import GuestFolder, RunFolder
from moestro.train.hardware import peak_flops
from moestro.train.health import require_finite, to_skip
from moestro.train.memory import keep_freed_memory
from moestro.train.metrics import MetricsLog
from moestro.train.optim import build_optimizer, clip_gradients, set_learning_rate
from moestro.train.progress import Display, Silent
from moestro.train.rules import QueryNormStatistics, Rule
from moestro.train.schedules import Scheduled, weight_at
from moestro.train.settings import TrainSettings
from moestro.train.signals import StopSignal, TrainingStopped
from moestro.train.state import TrainState
from moestro.train.step import Batches, ScheduledObjectives, backward, check_names, measure
from moestro.train.tables import prepare_tables


def train(
    model: Transformer,
    dataset: Batches,
    settings: TrainSettings,
    objectives: ScheduledObjectives,
    rules: Sequence[Rule],
    run_dir: Path,
    progress: Display | None = None,
    claim: Callable[[RunFolder], None] | None = None,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Train until the budget is used; returns the final metrics, which are also in `run_dir`/done.json.

    `claim` is called first of all once the folder is locked: to see whether it may be used, and to add files to it.

    Where `run_dir` has a checkpoint, training goes on from the newest; where it has a result, that is returned and
    `model` stays as it is. On the CPU, training that was interrupted at any moment ends as if it had not been, to the
    last bit.

    With several `ranks` every one of them calls it, with the same model, and gets the same metrics; each computes its
    share of every batch. The main rank alone writes to `run_dir`, but for checkpoints, calls `claim` and has a display.
    A signal to any rank stops all.

    Raises: RunFolderError, CheckpointError, Diverged; TrainingStopped after SIGTERM or SIGINT, once saved.
    """
    ranks = ranks or Ranks.alone(next(model.parameters()).device)
    check_precision(ranks.device, settings.precision)
    check_names(objectives)
    check_shares(settings, ranks)
    kind, display = (RunFolder, progress or Silent()) if ranks.main else (GuestFolder, Silent())
    with kind(run_dir) as folder, StopSignal(patient=launched()) as stop, display:
        if claim is not None and ranks.main:
            claim(folder)
        newest, result = ranks.told((folder.newest_checkpoint, folder.result) if ranks.main else None)
        if result is not None:
            if newest is not None:
                first_state(model, dataset, settings, objectives, rules, ranks).require_same(newest)
            return result
        prepare_tables(model, settings)
        if ranks.several:
            from moestro.parallel.parallelize import parallelize

            parallelize(model, ranks, settings.parallel, settings.precision, settings.compile)
        keep_freed_memory()
        torch.manual_seed(settings.seed)
        model.recompute = settings.recompute
        state = first_state(model, dataset, settings, objectives, rules, ranks)
        for rule in state.rules:
            rule.start(model, state.optimizer)
        if newest is not None:
            state.restore(newest)
            display.message(f"continuing from {newest.name}")
        folder.add_session({"from_step": state.counters.step, "ranks": ranks.world, **describe_machine(ranks.device)})
        with MetricsLog(folder, settings, state.counters, display) as log, state.writer:
            run(dataset, objectives, state, folder, log, stop)
        return ended(folder, ranks, ranks.told(state.result()))


def ended(folder: RunFolder, ranks: Ranks, result: dict[str, Any]) -> dict[str, Any]:
    """Record the result; where several ranks wrote checkpoints in pieces, their models are joined first."""
    if ranks.main:
        for path in list_checkpoints(folder.checkpoints):
            join_model(path)
    return folder.finish(result)


def check_shares(settings: TrainSettings, ranks: Ranks) -> None:
    """Raises: ValueError where micro-batches cannot be divided equally among the ranks."""
    if settings.micro_batch % ranks.world:
        raise ValueError(
            f"train batch_size={settings.batch_size} in accumulate={settings.accumulate} micro-batches cannot be "
            f"shared by {ranks.world} ranks: {ranks.world * settings.accumulate} must divide it"
        )


def first_state(
    model: Transformer,
    dataset: Batches,
    settings: TrainSettings,
    objectives: ScheduledObjectives,
    rules: Sequence[Rule],
    ranks: Ranks | None = None,
) -> TrainState:
    """A run before its first step; its rules have not started."""
    same = {"data": {"fingerprint": dataset.fingerprint}, "objectives": weights_of(objectives)}
    optimizer = build_optimizer(model, settings.optim)
    everyone = ranks or Ranks.alone(next(model.parameters()).device)
    return TrainState(model, optimizer, [QueryNormStatistics(), *rules], settings, same, ranks=everyone)


def run(
    dataset: Batches,
    objectives: ScheduledObjectives,
    state: TrainState,
    folder: RunFolder,
    log: MetricsLog,
    stop: StopSignal,
) -> None:
    """The optimizer steps from where `state` is to the end of the budget."""
    model, optimizer, settings, counters = state.model, state.optimizer, state.settings, state.counters
    ranks, peak = state.ranks, peak_flops(state.ranks.device, settings.precision)
    forward: Any = torch.compile(model) if settings.compile and not ranks.several else model
    model.train()
    share = counters.share(settings.budget)
    while share < 1:
        batch = dataset.train_batch(counters.step, settings.batch_size, settings.seed)
        ranks.seed_step(settings.seed, counters.step)
        optimizer.zero_grad(set_to_none=True)
        now = [(name, weight_at(weight, share, counters.step), part) for name, weight, part in objectives]
        sums = backward(forward, batch, settings, now, state.rules, ranks)
        grad_norm = finish_gradients(state)
        measured = measure(sums, grad_norm, batch, now, ranks)

        # The rate of the middle of the step: neither 0 in the first nor past the schedule's end in the last.
        counters.add(measured)
        before, share = share, counters.share(settings.budget)
        lr = settings.optim.lr * settings.optim.schedule(min(1.0, (before + share) / 2), share / counters.step)
        broken = to_skip(measured, counters, settings, lr)
        finish_step(state, lr, bool(broken))
        log.step(measured, lr, peak, broken)

        finished, better = share >= 1, False
        if finished or due(settings.eval_every, counters.step):
            held_out = dataset.val_batches(settings.micro_batch, settings.eval_tokens)
            figures = evaluate(model, held_out, precision=settings.precision, ranks=ranks)
            require_finite({"held-out loss": figures["loss"]}, counters.step, lr)
            better = counters.evaluated(figures) and settings.keep_best
            log.evaluation(figures)
        stopping = ranks.any(stop.name is not None)
        if finished or better or stopping or due(settings.save_every, counters.step):
            saved = state.save(folder, log.sync())
            if stopping and not finished:
                state.writer.wait()
                raise stopped(stop, saved)
        log.skip()
    state.writer.wait()


def stopped(stop: StopSignal, saved: Path) -> TrainingStopped:
    """What ends a run that a signal to one of its ranks has stopped."""
    signal = stop.name or "a signal to another rank"
    return TrainingStopped(f"stopped by {signal}, saved {saved}; the same command continues from there")


def finish_gradients(state: TrainState) -> Tensor:
    """Let rules change the step's gradients, then clip them; returns their norm before that, on the device."""
    for rule in state.rules:
        rule.gradients(state.counters.step + 1)
    return clip_gradients(state.model, state.settings.optim.clip, state.ranks)


def finish_step(state: TrainState, lr: float, skipped: bool) -> None:
    """Let the optimizer and then the rules change the model, or neither, where the step is skipped."""
    if not skipped:
        set_learning_rate(state.optimizer, lr)
        state.optimizer.step()
    for rule in state.rules:
        (rule.skip if skipped else rule.apply)(state.counters.step)


def weights_of(objectives: ScheduledObjectives) -> dict[str, float | str]:
    """Every objective's weight, as JSON values."""
    return {name: repr(weight) if isinstance(weight, Scheduled) else weight for name, weight, _ in objectives}


def due(every: int, step: int) -> bool:
    """Whether something that happens every `every` steps (0: never) happens after `step`."""
    return every > 0 and step % every == 0

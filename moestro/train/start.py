"""A run folder whose training has not begun: weights that come from elsewhere, as the checkpoint of step 0."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from moestro.model import Transformer
from moestro.train.environment import describe_machine
from moestro.train.folder import RunFolder, RunFolderError
from moestro.train.loop import first_state
from moestro.train.rules import Rule
from moestro.train.settings import TrainSettings
from moestro.train.step import Batches, ScheduledObjectives


def write_start(
    model: Transformer,
    dataset: Batches,
    settings: TrainSettings,
    objectives: ScheduledObjectives,
    rules: Sequence[Rule],
    run_dir: Path,
    claim: Callable[[RunFolder], None],
) -> Path:
    """Write the model as a run of these settings before its first step; returns the checkpoint. `train` goes on from
    there as from any other. `claim` adds the run's other files.

    Raises: RunFolderError where the folder has a run already, or cannot be written.
    """
    with RunFolder(run_dir) as folder:
        if folder.newest_checkpoint is not None or folder.result is not None:
            raise RunFolderError(f"{run_dir} holds a run already: choose another folder")
        claim(folder)
        state = first_state(model, dataset, settings, objectives, rules)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            for rule in state.rules:
                rule.start(model, state.optimizer)
            folder.add_session({"from_step": 0, **describe_machine(next(model.parameters()).device)})
            return state.save(folder, metrics_bytes=0)

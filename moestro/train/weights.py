"""Trained weights from a run folder, for evaluation and for other training runs."""

from pathlib import Path

from torch import nn

from moestro.train.checkpoint import CheckpointError, list_checkpoints, read_state, read_tensors, step_of
from moestro.train.tensors import load_model


def newest_checkpoint(run_dir: Path) -> Path:
    """The checkpoint of the highest step.

    Raises: CheckpointError where the run has none.
    """
    found = list_checkpoints(Path(run_dir) / "checkpoints")
    if not found:
        raise CheckpointError(f"run folder {run_dir} has no checkpoint: train it first")
    return found[-1]


def best_checkpoint(run_dir: Path) -> Path:
    """The checkpoint with the lowest held-out loss of the run so far.

    Raises: CheckpointError where the run has no evaluated checkpoint.
    """
    newest = newest_checkpoint(run_dir)
    best = read_state(newest)["counters"]["best_step"]
    for path in list_checkpoints(newest.parent):
        if step_of(path) == best:
            return path
    raise CheckpointError(f"run folder {run_dir} keeps no evaluated checkpoint (keep_best, eval_every)")


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Copy a checkpoint's parameters and buffers into `model`, once its files are verified.

    Raises: CheckpointError where it is damaged or of another model.
    """
    state = read_state(checkpoint)
    load_model(model, read_tensors(checkpoint, "model"), state["tied"])

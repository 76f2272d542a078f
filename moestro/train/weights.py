"""Trained weights from a run folder, for evaluation and for other training runs."""

from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import nn

from moestro.layers import Adapters
from moestro.ops.whole_files import TEMPORARY, sync_file
from moestro.train.checkpoint import CheckpointError, list_checkpoints, read_model, read_state, step_of
from moestro.train.tensors import load_model, model_tensors


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


def save_adapters(adapters: Adapters, file: Path) -> None:
    """Write the weights of a model's adapters, and nothing of what they stand around, to one safetensors file."""
    temporary = file.with_name(TEMPORARY + file.name)
    save_file({name: value.detach().cpu().contiguous() for name, value in adapters.state_dict().items()}, temporary)
    sync_file(temporary)
    temporary.replace(file)


def load_adapters(adapters: Adapters, file: Path) -> None:
    """Copy what `save_adapters` wrote into adapters of the same names and sizes.

    Raises: ValueError naming the first that differ.
    """
    adapters.load_state_dict(load_file(file))


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Copy a checkpoint's parameters and buffers into `model`, once its files are verified.

    Raises: CheckpointError where it is damaged or of another model.
    """
    state = read_state(checkpoint)
    load_model(model, read_model(checkpoint, model_tensors(model)[0]), state["tied"])

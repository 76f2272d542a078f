"""Checkpoint folders: tensors in safetensors files, the rest in `state.json`, every file with its SHA-256.

A folder `step-00000123` appears complete or not at all. Nothing is pickled.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from moestro.formats.writer import write_tensors
from moestro.ops.whole_files import TEMPORARY
from moestro.train.durable import (
    publish_folder,
    remove_folder,
    remove_temporary,
    sha256,
    sha256_json,
)
from moestro.upgrades import CHECKPOINT, Shapes, VersionError

STATE = "state.json"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read or written; the message says which file and what to do."""


def write_checkpoint(
    checkpoints: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]
) -> Path:
    """Write `step-<step>` with one safetensors file for each name in `tensors`, and `state`; returns its path. Tensors
    are written from where they lie, without a second copy of them.

    Raises: CheckpointError where the disk refuses; the unfinished folder is removed.
    """
    path = checkpoints / f"step-{step:08d}"
    temporary = checkpoints / (TEMPORARY + path.name)
    try:
        temporary.mkdir(parents=True)
        files = {f"{name}.safetensors": named for name, named in tensors.items()}
        hashes = {name: write_tensors(temporary / name, named) for name, named in files.items()}
        content = {CHECKPOINT.key: CHECKPOINT.version, "step": step, "sha256": hashes, **state}
        content["checksum"] = sha256_json(content)
        (temporary / STATE).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        publish_folder(temporary, path)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"cannot write checkpoint {path}: {error}.{advice(checkpoints)}") from error
    return path


def advice(checkpoints: Path) -> str:
    """What is left to continue from when a checkpoint could not be written."""
    names = [path.name for path in list_checkpoints(checkpoints)]
    left = f"continues from {names[-1]}" if names else "starts again from the beginning (no checkpoint is complete)"
    return f" Free space or make the folder writable; the same command then {left}"


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Complete checkpoint folders, oldest first."""
    return sorted(checkpoints.glob("step-*"))


def step_of(path: Path) -> int:
    """The optimizer step after which a checkpoint was written."""
    return int(path.name.removeprefix("step-"))


def read_state(path: Path) -> dict[str, Any]:
    """The content of `state.json` as today's version has it, once every file of the checkpoint is shown to be what was
    written.

    Raises: CheckpointError naming the damaged file with its expected and actual hash, and the earlier checkpoint that
    can be used instead; VersionError where a newer moestro wrote it.
    """
    try:
        return verified_state(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}. {way_out(path)}") from error.__cause__


def verified_state(path: Path) -> dict[str, Any]:
    """As `read_state`, without advice."""
    file = path / STATE
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path.name} is damaged: {file} cannot be read ({error})") from error
    if not isinstance(state, dict) or "checksum" not in state:
        raise CheckpointError(f"checkpoint {path.name} is damaged: {file} has no checksum")
    compare_hash(file, state.pop("checksum"), sha256_json(state))
    state = CHECKPOINT.upgraded(state, file)
    for name, expected in state["sha256"].items():
        if not (path / name).is_file():
            raise CheckpointError(f"checkpoint {path.name} is damaged: {path / name} is missing")
        compare_hash(path / name, expected, sha256(path / name))
    return state


def compare_hash(file: Path, expected: str, actual: str) -> None:
    """Raises: CheckpointError where the two hashes differ."""
    if expected != actual:
        raise CheckpointError(
            f"checkpoint {file.parent.name} is damaged: {file} has sha256 {actual}, expected {expected}"
        )


def way_out(path: Path) -> str:
    """What to do about a damaged checkpoint: the newest earlier one that is intact."""
    for earlier in reversed([p for p in list_checkpoints(path.parent) if p.name < path.name]):
        try:
            verified_state(earlier)
        except (CheckpointError, VersionError):
            continue
        return f"{earlier.name} is intact: remove {path} to continue from there"
    return f"No earlier checkpoint is intact: remove {path} to start again from the beginning"


def read_tensors(path: Path, name: str) -> dict[str, Tensor]:
    """Tensors of one safetensors file of a checkpoint, on the CPU."""
    tensors = load_file(path / f"{name}.safetensors")
    if name != "model":
        return tensors
    return tensors | added_tensors(path, {name: tuple(tensor.shape) for name, tensor in tensors.items()})


def added_tensors(path: Path, shapes: Shapes) -> dict[str, Tensor]:
    """What a model's checkpoint of a former version lacks, given the tensors that lie in it; nothing where it is of
    today's."""
    file = path / STATE
    version = CHECKPOINT.version_of(json.loads(file.read_text(encoding="utf-8")), file)
    return CHECKPOINT.added(version, shapes)


def keep_checkpoints(checkpoints: Path, last: int, best_step: int | None) -> None:
    """Remove all but the `last` newest checkpoints and the one of `best_step`."""
    for path in list_checkpoints(checkpoints)[:-last]:
        if step_of(path) != best_step:
            remove_folder(path)


def clear_unfinished(checkpoints: Path) -> None:
    """Remove checkpoint folders whose writing or removal was interrupted."""
    remove_temporary(checkpoints)

"""Checkpoint folders: tensors in safetensors files, the rest in `state.json`, every file with its SHA-256.

A folder `step-00000123` appears complete or not at all. Nothing is pickled.
"""

import json
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from moestro.formats.shards import is_file_name
from moestro.formats.writer import write_tensors
from moestro.ops.whole_files import TEMPORARY, sha256, sha256_json, sync_file
from moestro.parallel.layout import Layout, whole_layout
from moestro.parallel.ranks import Ranks
from moestro.train.durable import publish_folder, remove_folder, write_text
from moestro.upgrades import CHECKPOINT, Shapes, VersionError

STATE = "state.json"
NAME = re.compile(r"step-\d{8,}")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read or written; the message says which file and what to do."""


def write_checkpoint(
    checkpoints: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]
) -> Path:
    """Write `step-<step>` with one safetensors file for each name in `tensors`, and `state`; returns its path. Tensors
    are written from where they lie, without a second copy of them.

    Raises: CheckpointError where the disk refuses; the unfinished folder is removed.
    """
    path = checkpoint_of(checkpoints, step)
    with publishing(path, state) as (folder, hashes):
        folder.mkdir(parents=True)
        for name, named in tensors.items():
            hashes[f"{name}.safetensors"] = write_tensors(folder / f"{name}.safetensors", named)
    return path


@contextmanager
def publishing(path: Path, state: dict[str, Any]) -> Iterator[tuple[Path, dict[str, str]]]:
    """Gives a folder that the block makes and fills, and a dict for the SHA-256 of its files; then adds `state`, and it
    appears as the checkpoint `path`.

    Raises: CheckpointError where the disk refuses; the unfinished folder is removed.
    """
    temporary, hashes = unfinished(path), {}
    try:
        yield temporary, hashes
        content = described({"step": step_of(path), "sha256": hashes, **state})
        (temporary / STATE).write_text(content, encoding="utf-8")
        publish_folder(temporary, path)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"cannot write checkpoint {path}: {error}.{advice(path.parent)}") from error


def checkpoint_of(checkpoints: Path, step: int) -> Path:
    """The folder of the checkpoint after optimizer step `step`."""
    return checkpoints / f"step-{step:08d}"


def unfinished(path: Path) -> Path:
    """The folder in which a checkpoint is written before it appears."""
    return path.with_name(TEMPORARY + path.name)


def advice(checkpoints: Path) -> str:
    """What is left to continue from when a checkpoint could not be written."""
    names = [path.name for path in list_checkpoints(checkpoints)]
    left = f"continues from {names[-1]}" if names else "starts again from the beginning (no checkpoint is complete)"
    return f" Free space or make the folder writable; the same command then {left}"


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Complete checkpoint folders, oldest first; a copy of one under another name is none."""
    return sorted((path for path in checkpoints.glob("step-*") if NAME.fullmatch(path.name)), key=step_of)


def step_of(path: Path) -> int:
    """The optimizer step after which a checkpoint was written."""
    return int(path.name.removeprefix("step-"))


def read_state(path: Path, ranks: Ranks | None = None) -> dict[str, Any]:
    """The content of `state.json` as today's version has it, once every file of the checkpoint is shown to be what was
    written; of several ranks each looks at some of the files.

    Raises: CheckpointError naming the damaged file with its expected and actual hash, and the earlier checkpoint that
    can be used instead; VersionError where a newer moestro wrote it.
    """
    try:
        return verified_state(path, ranks)
    except CheckpointError as error:
        raise CheckpointError(f"{error}. {way_out(path)}") from error.__cause__


def verified_state(path: Path, ranks: Ranks | None = None) -> dict[str, Any]:
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
    turn = slice(None) if ranks is None else slice(ranks.rank, None, ranks.world)
    for name, expected in sorted(state["sha256"].items())[turn]:
        if not is_file_name(name):
            raise CheckpointError(f"checkpoint {path.name} is damaged: {file}: {name!r} is not a file name")
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
    for earlier in reversed([p for p in list_checkpoints(path.parent) if step_of(p) < step_of(path)]):
        try:
            verified_state(earlier)
        except (CheckpointError, VersionError):
            continue
        return f"{earlier.name} is intact: remove {path} to continue from there"
    return f"No earlier checkpoint is intact: remove {path} to start again from the beginning"


def read_tensors(path: Path, name: str) -> dict[str, Tensor]:
    """Whole tensors of one kind in a checkpoint, on the CPU, whoever wrote it."""
    single = path / f"{name}.safetensors"
    if single.exists():
        tensors = load_file(single)
    else:
        wanted = {key: (whole_layout(shape), shape) for key, shape in stored_shapes(path, name).items()}
        tensors = read_parts(path, name, wanted)
    return tensors


def read_model(path: Path, wanted: Collection[str]) -> dict[str, Tensor]:
    """Whole tensors of the model in a checkpoint, and those of the names `wanted` that came after its version."""
    tensors = read_tensors(path, "model")
    return tensors | added_tensors(path, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, wanted)


def join_model(path: Path) -> None:
    """Give a checkpoint whose model several ranks wrote in pieces one file of it, as a single process writes: what
    reads files rather than runs finds it. The rest stays as it is; nothing happens where there are no pieces. At every
    moment in between the checkpoint is complete.

    Raises: CheckpointError where it is damaged, or the disk refuses.
    """
    pieces = sorted(path.glob("model-*.safetensors"))
    if not pieces:
        return
    state, whole = read_state(path), path / "model.safetensors"
    unfinished = path / (TEMPORARY + whole.name)
    try:
        hashes = {name: digest for name, digest in state["sha256"].items() if path / name not in pieces}
        hashes[whole.name] = write_tensors(unfinished, read_tensors(path, "model"))
        sync_file(unfinished)
        os.replace(unfinished, whole)  # from now on it is what is read
        sync_file(path)
        write_text(path / STATE, described(state | {"sha256": hashes}))
        for piece in pieces:
            piece.unlink()
    except OSError as error:
        raise CheckpointError(f"cannot write {whole}: {error}.{advice(path.parent)}") from error


def described(state: dict[str, Any]) -> str:
    """The text of `state.json`: today's version, and a checksum."""
    content = {**state, CHECKPOINT.key: CHECKPOINT.version}
    return json.dumps({**content, "checksum": sha256_json(content)}, indent=1, allow_nan=False) + "\n"


def stored_shapes(path: Path, name: str) -> dict[str, tuple[int, ...]]:
    """The whole shape of every tensor of one kind in a checkpoint."""
    from moestro.parallel import storage

    return {key: tuple(shape) for key, (shape, _) in storage.stored_shapes(path, name).items()}


def read_parts(path: Path, name: str, wanted: Mapping[str, tuple[Layout, tuple[int, ...]]]) -> dict[str, Tensor]:
    """This rank's parts of tensors of one kind in a checkpoint, given where each lies and the part's shape."""
    from moestro.parallel import storage

    dtypes = {key: dtype for key, (_, dtype) in storage.stored_shapes(path, name).items()}
    return storage.read_pieces(path, name, {key: (*place, dtypes[key]) for key, place in wanted.items()})


def added_tensors(path: Path, shapes: Shapes, wanted: Collection[str]) -> dict[str, Tensor]:
    """What a model's checkpoint of a former version lacks of the names `wanted`, given the tensors that lie in it;
    nothing where it is of today's."""
    file = path / STATE
    version = CHECKPOINT.version_of(json.loads(file.read_text(encoding="utf-8")), file)
    return {name: tensor for name, tensor in CHECKPOINT.added(version, shapes).items() if name in wanted}


def keep_checkpoints(checkpoints: Path, last: int, best_step: int | None) -> None:
    """Remove all but the `last` newest checkpoints and the one of `best_step`."""
    for path in list_checkpoints(checkpoints)[:-last]:
        if step_of(path) != best_step:
            remove_folder(path)

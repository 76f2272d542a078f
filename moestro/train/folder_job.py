"""A folder that is filled file by file under a temporary name, by one process at a time, and continued after a kill."""

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

from moestro.formats.writer import Outgoing, file_pieces, write_file
from moestro.ops.whole_files import TEMPORARY, holding, lock_folder, record_hashes, sync_file
from moestro.train.durable import publish_folder, write_json

JOB, DONE = "job.json", "done.json"


class FolderInUse(RuntimeError):
    """Another process is writing the folder."""

    def __init__(self, destination: Path) -> None:
        super().__init__(f"another process is writing {destination}: wait for it, stop it, or choose another folder")


class FolderJob:
    """What becomes the folder `destination`. `job` (JSON) says what is written: files that an interrupted process
    finished are kept where it was the same, and everything begins anew where it was another.

    Entered, it holds a lock until it is left. Raises: FolderInUse where another process holds it.
    """

    def __init__(self, destination: Path, job: Mapping[str, Any]) -> None:
        self.destination, self.job = destination, dict(job)
        self.path = destination.with_name(TEMPORARY + destination.name)
        self.control = destination.with_name(TEMPORARY + destination.name + ".job")

    def __enter__(self) -> Self:
        with ExitStack() as entered:
            entered.enter_context(holding(self.control, FolderInUse(self.destination)))
            self._continue()
            self._held = entered.pop_all()
        return self

    def _continue(self) -> None:
        """Take up what an interrupted process left of the same job, and clear all else."""
        if read_control(self.control / JOB) != self.job:
            shutil.rmtree(self.path, ignore_errors=True)
            (self.control / DONE).unlink(missing_ok=True)
            write_json(self.control / JOB, self.job)
        self.path.mkdir(exist_ok=True)
        done: dict[str, dict[str, Any]] = read_control(self.control / DONE) or {}
        self.done = {name: said for name, said in done.items() if self._intact(name, said)}
        # the rest is written again, and must not be listed or hashed before
        kept = {self.path / name for name in self.done}
        for file in [file for file in self.path.rglob("*") if file.is_file() and file not in kept]:
            file.unlink()

    def __exit__(self, *exception: object) -> None:
        self._held.close()

    def _intact(self, name: str, said: Mapping[str, Any]) -> bool:
        file = self.path / name
        return file.is_file() and file.stat().st_size == said["bytes"]

    def write(self, name: str, tensors: Sequence[Outgoing], metadata: Mapping[str, str]) -> None:
        """Write one file of tensors, unless it is there."""
        if name not in self.done:
            half = self.path / (TEMPORARY + name)
            digest = write_file(half, tensors, metadata, sparse=True)
            self._finish(half, name, digest)

    def copy(self, name: str, source: Path) -> None:
        """Copy a file byte by byte, unless it is there; `name` may lie in a folder inside this one."""
        if name not in self.done:
            half = (self.path / name).with_name(TEMPORARY + Path(name).name)
            half.parent.mkdir(parents=True, exist_ok=True)
            digest = hashlib.sha256()
            with half.open("wb") as file:
                for piece in file_pieces(source, 0, source.stat().st_size):
                    digest.update(piece)
                    file.write(piece)
            self._finish(half, name, digest.hexdigest())

    def _finish(self, half: Path, name: str, digest: str) -> None:
        sync_file(half)
        os.replace(half, self.path / name)
        sync_file(half.parent)
        self.done[name] = {"bytes": (self.path / name).stat().st_size, "sha256": digest}
        write_json(self.control / DONE, self.done)

    def record_hashes(self, but: Collection[str] = ()) -> None:
        """Write down the hashes of all files but those that readers are to edit."""
        names = [file.relative_to(self.path).as_posix() for file in self.path.rglob("*") if file.is_file()]
        known = {name: said["sha256"] for name, said in self.done.items() if name not in but}
        record_hashes(self.path, [name for name in names if name not in but], known)

    def publish(self) -> Path:
        """Give the folder its own name, in one step."""
        publish_folder(self.path, self.destination)
        shutil.rmtree(self.control)
        return self.destination


def named_folder(path: Path) -> Path:
    """The folder itself, beside which a temporary one may lie: links are followed, `.` and `..` have names.

    Raises: ValueError for the root of a file system.
    """
    folder = path.expanduser().resolve()
    if not folder.name:
        raise ValueError(f"{path} is the root of the file system: choose another folder")
    return folder


def lies_in(path: Path, folder: Path) -> bool:
    """Whether what is written at `path` is written into `folder`, links followed."""
    return folder.resolve() in (path.resolve(), *path.resolve().parents)


def clear_finished(destination: Path) -> None:
    """Remove what a process that was killed just after it gave the folder its name left beside it."""
    control = destination.with_name(TEMPORARY + destination.name + ".job")
    with suppress(FileNotFoundError):
        if (handle := lock_folder(control)) is not None:
            shutil.rmtree(control)
            os.close(handle)


def read_control(path: Path) -> Any:
    """What a file of this module says; None where there is none, or half of one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None

"""The run folder: one process at a time, metrics that match the checkpoints, a result once training is over."""

import errno
import fcntl
import hashlib
import json
import os
from contextlib import ExitStack
from io import FileIO
from pathlib import Path
from typing import Any, Self

from moestro.ops.whole_files import forget_hashes, record_hashes, recorded_hashes, require_intact
from moestro.train.checkpoint import list_checkpoints
from moestro.train.durable import remove_temporary, write_json


class RunFolderError(RuntimeError):
    """The run folder is in use, cannot be written, or does not fit its checkpoints."""


class RunFolder:
    """`run_dir` and what lies in it:

    lock, environment.json, metrics.jsonl, tensorboard/, checkpoints/step-00000123/, done.json (the final metrics; it is
    there when training is over), hashes.json (of files that no checkpoint knows). Entered, it holds the lock until it
    is left or the process ends in whatever way.

    Raises: RunFolderError where another process holds it or it cannot be written.
    """

    main = True

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"

    def __enter__(self) -> Self:
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self.lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise unwritable(self.path, error) from error
        self._take_lock()
        remove_temporary(self.path)
        remove_temporary(self.checkpoints)
        return self

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            pid = os.read(self.lock, 32).decode() or "unknown"
            os.close(self.lock)
            raise RunFolderError(
                f"run folder {self.path} is in use by process {pid}: wait for it, stop it, or choose another folder"
            ) from error
        os.ftruncate(self.lock, 0)
        os.pwrite(self.lock, str(os.getpid()).encode(), 0)

    def __exit__(self, *exception: object) -> None:
        os.close(self.lock)

    @property
    def newest_checkpoint(self) -> Path | None:
        """The complete checkpoint of the highest step."""
        return next(reversed(list_checkpoints(self.checkpoints)), None)

    @property
    def result(self) -> dict | None:
        """The final metrics of a finished run, None while it is not finished."""
        file = self.path / "done.json"
        require_intact(self.path, file.name)
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def finish(self, result: dict) -> dict:
        """Record the final metrics, which marks the run as finished."""
        if not self.main:
            return result
        own = ("done.json", self.metrics.name)
        # of files that were written long ago what they were then, not what they are now
        hashes = {name: value for name, value in recorded_hashes(self.path).items() if name not in own}
        try:
            forget_hashes(self.path)
            self.write_json("done.json", result)
            record_hashes(self.path, [name for name in own if (self.path / name).is_file()], hashes)
        except OSError as error:
            raise unwritable(self.path, error) from error
        return result

    def open_metrics(self, size: int, sha256: str = "") -> "MetricsFile | NoMetrics":
        """metrics.jsonl, as it was when it had `size` bytes and, where it is known, this hash."""
        return MetricsFile(self.metrics, size, sha256)

    def add_session(self, session: dict) -> None:
        """Append to the list in environment.json: one entry for every process that worked on the run."""
        file = self.path / "environment.json"
        try:
            sessions = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
        except ValueError as error:
            raise RunFolderError(
                f"{file} is damaged ({error}): restore it, or remove it; it only says where the run was trained"
            ) from error
        self.write_json("environment.json", [*sessions, session])

    def write_json(self, name: str, value: Any) -> None:
        """Replace a JSON file of the folder in one step."""
        try:
            write_json(self.path / name, value)
        except OSError as error:
            raise unwritable(self.path / name, error) from error


class GuestFolder(RunFolder):
    """The run folder as ranks other than the main one have it: they read what is there and write nothing."""

    main = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None: ...

    def open_metrics(self, size: int, sha256: str = "") -> "MetricsFile | NoMetrics":
        return NoMetrics()

    def write_json(self, name: str, value: Any) -> None: ...


class NoMetrics:
    """Takes lines of metrics and keeps none."""

    sha256 = ""

    def write(self, line: dict) -> None: ...

    def sync(self) -> int:
        return 0

    def close(self) -> None: ...


class MetricsFile:
    """metrics.jsonl: one JSON object a line, cut back to `size` bytes when opened, so that what a killed process wrote
    after its last checkpoint goes and the file becomes that of an uninterrupted run.

    Raises: RunFolderError where the file is shorter than its checkpoint says, is another up to there by its `sha256`
    (where that is known), or cannot be written.
    """

    def __init__(self, path: Path, size: int, sha256: str = "") -> None:
        self.path = path
        try:
            with ExitStack() as refused:
                self.file: FileIO = refused.enter_context(path.open("ab", buffering=0))
                self._cut_back(size, sha256)
                refused.pop_all()
        except OSError as error:
            raise unwritable(path, error) from error

    def _cut_back(self, size: int, sha256: str) -> None:
        actual = self.file.tell()
        if actual < size:
            raise RunFolderError(
                f"{self.path} has {actual} bytes, its checkpoint was written at {size}: lines are missing. Restore the "
                "file, or train again in another folder"
            )
        # Devices such as /dev/full have no size to cut.
        if actual > size:
            self.file.truncate(size)
        self.hash = hashlib.sha256(self.path.read_bytes() if size else b"")
        if sha256 and self.sha256 != sha256:
            raise RunFolderError(
                f"{self.path} is damaged: its first {size} bytes have sha256 {self.sha256}, its checkpoint says "
                f"{sha256}. Restore the file, or train again in another folder"
            )

    @property
    def sha256(self) -> str:
        """Hexadecimal SHA-256 of all lines so far."""
        return self.hash.hexdigest()

    def write(self, line: dict) -> None:
        """Append one object."""
        try:
            left = json.dumps(line, allow_nan=False).encode() + b"\n"
            self.hash.update(left)
            while left:
                left = left[self.file.write(left) :]
        except OSError as error:
            raise unwritable(self.path, error) from error

    def sync(self) -> int:
        """Force all lines to the disk; returns the file's size in bytes."""
        try:
            os.fsync(self.file.fileno())
        except OSError as error:
            raise unwritable(self.path, error) from error
        return self.file.seek(0, os.SEEK_END)

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def require_writable(path: Path) -> None:
    """Make nothing yet, but see whether a run folder could be made at `path`, before long work for it begins.

    Raises: RunFolderError.
    """
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise unwritable(path, OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)))
    if not os.access(there, os.W_OK | os.X_OK):
        why = errno.EROFS if os.statvfs(there).f_flag & os.ST_RDONLY else errno.EACCES
        raise unwritable(path, OSError(why, os.strerror(why)))


def unwritable(path: Path, error: OSError) -> RunFolderError:
    """The error for a path that the system refuses to write."""
    return RunFolderError(
        f"cannot write {path}: {error.strerror}. Free space or make it writable, then run the same command again: "
        "it continues from the last complete checkpoint"
    )

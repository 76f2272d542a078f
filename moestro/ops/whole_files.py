"""Files that are whole or absent, also after a crash or a power cut, and known again by their hashes; folders that one
process holds at a time."""

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

from moestro.ops.cores import own_cores

# what is not finished yet, whatever becomes of it
TEMPORARY = ".writing-"
# the hashes of the files beside it
HASHES = "hashes.json"
# files that are read at a time to be hashed
MOST_HASHED = 8


class DamagedFile(ValueError):
    """A file is not what was written; the message says which and what to do."""


def sync_file(path: Path) -> None:
    """Force a file's or folder's content to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file by `content` in one step, that to which `path` links where it is a link; what is no file
    (/dev/null, a pipe) is written to."""
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    path = path.resolve()
    temporary = path.with_name(TEMPORARY + path.name)
    try:
        temporary.write_bytes(content)
        sync_file(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_file(path.parent)


def lock_folder(folder: Path) -> int | None:
    """Hold a folder until the returned handle is closed or the process ends in whatever way; None where another process
    holds it. The lock is on the folder itself: it leaves nothing behind and goes with it where it is renamed.

    Raises: FileNotFoundError where there is no such folder, or it is removed by whoever held it.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(handle), os.stat(folder)):
            return handle
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
    except BlockingIOError:
        os.close(handle)
        return None
    except OSError:
        os.close(handle)
        raise


@contextmanager
def holding(folder: Path, refusal: Exception) -> Iterator[Path]:
    """Hold `folder`, which is made where it is not there, until the block ends; the block may remove it.

    Raises: `refusal` where another process holds it.
    """
    handle = None
    while handle is None:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            handle = lock_folder(folder)
        except FileNotFoundError:
            # it was removed when it was let go
            continue
        if handle is None:
            raise refusal
    try:
        yield folder
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hashes_of(files: Iterable[Path]) -> list[str]:
    """`sha256` of each, several at a time: one core hashes more slowly than most disks read."""
    files = list(files)
    if len(files) < 2:
        return [sha256(file) for file in files]
    with ThreadPoolExecutor(min(MOST_HASHED, len(files), own_cores())) as pool:
        return list(pool.map(sha256, files))


def sha256_json(value: Any) -> str:
    """Hexadecimal SHA-256 of a value's JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def record_hashes(folder: Path, names: Iterable[str], known: Mapping[str, str] | None = None) -> None:
    """Write down the hashes of these files of a folder, beside them; of those in `known` without reading them.

    Where such files are written again, `forget_hashes` comes first: a process that is killed in between leaves files
    without hashes, which are believed, and not files with other hashes, which are not.
    """
    found = {**(known or {}), **{name: sha256(folder / name) for name in names if name not in (known or {})}}
    said = {"sha256": dict(sorted(found.items())), "checksum": sha256_json(found)}
    write_bytes(folder / HASHES, (json.dumps(said, indent=1) + "\n").encode())


def forget_hashes(folder: Path) -> None:
    """Before files that have hashes are written again."""
    (folder / HASHES).unlink(missing_ok=True)


def recorded_hashes(folder: Path) -> dict[str, str]:
    """{file: SHA-256} as `record_hashes` wrote it down, empty where it did not.

    Raises: DamagedFile where that is not what it wrote, or names a file outside of the folder.
    """
    file = folder / HASHES
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        outside = [name for name in dict(said["sha256"]) if {"..", "/"} & {*PurePath(name).parts}]
        if said["checksum"] == sha256_json(said["sha256"]) and not outside:
            return said["sha256"]
        why = f"{outside[0]!r} lies outside of its folder" if outside else "its checksum is that of other content"
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError) as error:
        why = f"{type(error).__name__}: {error}"
    raise DamagedFile(
        f"{file} is damaged ({why}): restore it, or remove it where the files beside it are to be trusted"
    )


def require_intact(folder: Path, *names: str) -> None:
    """See whether files are what was written: these, as far as a hash of them was written down, or all that have one.

    Raises: DamagedFile naming file, expected and actual hash, and what to do.
    """
    hashes = recorded_hashes(folder)
    files = {name: folder / name for name in names or hashes if name in hashes}
    for file in files.values():
        if not file.is_file():
            raise DamagedFile(f"{file} is missing, {HASHES} beside it lists it: restore it")
    for name, found in zip(files, hashes_of(files.values()), strict=True):
        if found != hashes[name]:
            raise DamagedFile(
                f"{files[name]} is damaged: it has sha256 {found}, {HASHES} beside it says {hashes[name]}. Restore it; "
                f"where the change is meant, remove {folder / HASHES}"
            )

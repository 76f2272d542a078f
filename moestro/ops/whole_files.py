"""Files that are whole or absent, also after a crash or a power cut, and folders that one process holds at a time."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# what is not finished yet, whatever becomes of it
TEMPORARY = ".writing-"


def sync_file(path: Path) -> None:
    """Force a file's or folder's content to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file by `content` in one step."""
    temporary = path.with_name(TEMPORARY + path.name)
    temporary.write_bytes(content)
    sync_file(temporary)
    os.replace(temporary, path)
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

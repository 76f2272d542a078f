"""The cache folder: a finished thing appears in it whole, or not at all."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moestro.ops.whole_files import lock_folder, sync_file


def digest(*parts: object) -> str:
    """SHA-256 (hex) of the parts written as JSON: equal values, equal digest."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A temporary folder to fill; renamed to `folder` when the block ends without an error.

    Two processes may fill the same folder at once: the first to finish wins and the other's work is dropped,
    which loses nothing because the name stands for the content.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder)
    filling, handle = _new_filling(folder)
    try:
        yield filling
        # mkdtemp gives 0700; a shared cache follows the umask, as its parent does
        filling.chmod(folder.parent.stat().st_mode & 0o777)
        for file in (*filling.iterdir(), filling):
            sync_file(file)
        try:
            filling.rename(folder)
            sync_file(folder.parent)
        except OSError:
            if not folder.is_dir():
                raise
    except OSError as error:
        if error.filename is not None:
            raise
        # a write that the system refused: it does not say where
        what = f"cannot write {folder}: {error.strerror}. Free space, or choose another folder ($MOESTRO_CACHE)"
        raise OSError(error.errno, what) from error
    finally:
        shutil.rmtree(filling, ignore_errors=True)
        os.close(handle)


def _new_filling(folder: Path) -> tuple[Path, int]:
    """An empty folder beside `folder` that this process holds, and the handle it holds it by."""
    while True:
        filling = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        # another process may take one that nobody holds yet for abandoned
        with suppress(FileNotFoundError):
            if (handle := lock_folder(filling)) is not None:
                return filling, handle


def _remove_abandoned(folder: Path) -> None:
    """Delete what killed processes left half-filled for this same folder: whatever nobody holds."""
    for left in folder.parent.glob(f".{folder.name}.*"):
        # another process may finish or remove it while we look
        with suppress(FileNotFoundError):
            if (handle := lock_folder(left)) is not None:
                shutil.rmtree(left, ignore_errors=True)
                os.close(handle)

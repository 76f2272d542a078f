"""Texts and folders that are either complete or absent, also after a crash or a power cut."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from moestro.ops.whole_files import TEMPORARY, sync_file, write_bytes


def write_text(path: Path, text: str) -> None:
    """Replace a file by `text` in one step."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one step."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def publish_folder(temporary: Path, path: Path) -> None:
    """Give a folder that was filled under a temporary name its own name, in one step."""
    for file in temporary.iterdir():
        sync_file(file)
    sync_file(temporary)
    if path.exists():
        remove_folder(path)
    os.rename(temporary, path)
    sync_file(path.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder; interrupted, it leaves a temporary name that `remove_temporary` clears."""
    doomed = path.with_name(TEMPORARY + "removed-" + path.name)
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def empty(folder: Path) -> None:
    """Remove what lies in a folder, but not itself: whoever holds it still does."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def remove_temporary(folder: Path) -> None:
    """Remove what interrupted writers left in `folder`."""
    for path in folder.glob(TEMPORARY + "*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()

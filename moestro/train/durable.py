"""Files that are either complete or absent, also after a crash or a power cut."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

TEMPORARY = ".writing-"


def sync_file(path: Path) -> None:
    """Force a file's or folder's content to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Replace a file by `text` in one step."""
    temporary = path.with_name(TEMPORARY + path.name)
    temporary.write_text(text, encoding="utf-8")
    sync_file(temporary)
    os.replace(temporary, path)
    sync_file(path.parent)


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


def remove_temporary(folder: Path) -> None:
    """Remove what interrupted writers left in `folder`."""
    for path in folder.glob(TEMPORARY + "*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hexadecimal SHA-256 of a value's JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

"""Nothing that a mutated command does may change what lies outside a folder: this process is told so by the system.

A command line made at random may name any path, and the one who runs it may be allowed to write everywhere.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# audit events of what changes the file system, and which of their arguments are paths that change
CHANGES = {
    **dict.fromkeys(("os.mkdir", "os.rmdir", "os.remove", "os.truncate", "os.chmod", "os.chown", "os.utime"), (0,)),
    **{"os.rename": (0, 1), "os.link": (1,), "os.symlink": (1,), "shutil.rmtree": (0,), "shutil.move": (0, 1)},
}


class Fence:
    """Refuses changes outside `folder` while there is one; `crossed` are the paths that were tried."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.crossed: list[str] = []

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """An audit hook.

        Raises: PermissionError.
        """
        if self.folder is None:
            return
        if event == "open":
            paths = (arguments[0],) if isinstance(arguments[2], int) and arguments[2] & WRITES else ()
        else:
            paths = tuple(arguments[number] for number in CHANGES.get(event, ()))
        for path in paths:
            if isinstance(path, str | bytes | os.PathLike) and not self._inside(os.fsdecode(path)):
                self.crossed.append(os.fsdecode(path))
                raise PermissionError(13, "Permission denied", os.fsdecode(path))

    def _inside(self, path: str) -> bool:
        if self.folder is None or path == os.devnull or "\0" in path:
            return True
        parent, name = os.path.split(os.path.abspath(path))
        return Path(os.path.realpath(parent), name).is_relative_to(self.folder)


FENCE = Fence()
sys.addaudithook(FENCE)


@contextmanager
def confined(folder: Path) -> Iterator[Fence]:
    """Inside, whatever Python code of this process tries to change outside `folder` is refused as to one who may not
    write there. What is imported inside leaves no bytecode."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    FENCE.folder, FENCE.crossed = folder.resolve(), []
    try:
        yield FENCE
    finally:
        FENCE.folder = None
        sys.dont_write_bytecode = before

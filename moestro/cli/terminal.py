"""What verbs print besides their tables."""

import json
import math
import sys
from pathlib import Path
from typing import Any

# characters of an error; of a longer one the middle is left out
LONGEST = 1000


def failed(message: str, code: int) -> int:
    """Print an error in one line; returns the exit code."""
    print(f"moestro: error: {one_line(message)}", file=sys.stderr)
    return code


def one_line(message: str) -> str:
    """A message that may quote anything: what a terminal would obey is written out, what is too long is cut."""
    if len(message) > LONGEST:
        message = f"{message[: LONGEST // 2]} ... {message[-LONGEST // 2 :]}"
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in " ".join(message.split()))


def as_json(path: Path | None, figures: dict[str, Any]) -> bool:
    """Write figures where they are asked for, null for those that are no number or infinite, which JSON does not know;
    True where that is the terminal, which then gets nothing else."""
    text = json.dumps(_known(figures), indent=1, allow_nan=False)
    if path == Path("-"):
        print(text)
        return True
    if path is not None:
        from moestro.ops.whole_files import write_bytes

        write_bytes(path, f"{text}\n".encode())
    return False


def _known(value: Any) -> Any:
    """What JSON knows of it."""
    if isinstance(value, dict):
        return {key: _known(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_known(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

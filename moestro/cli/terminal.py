"""What verbs print besides their tables."""

import json
import sys
from pathlib import Path
from typing import Any


def failed(message: str, code: int) -> int:
    """Print an error; returns the exit code."""
    print(f"moestro: error: {message}", file=sys.stderr)
    return code


def as_json(path: Path | None, figures: dict[str, Any]) -> bool:
    """Write figures where they are asked for; True where that is the terminal, which then gets nothing else."""
    text = json.dumps(figures, indent=1)
    if path == Path("-"):
        print(text)
        return True
    if path is not None:
        from moestro.ops.whole_files import write_bytes

        write_bytes(path, f"{text}\n".encode())
    return False

"""Where what can be made again is kept."""

import os
from pathlib import Path


def cache_root() -> Path:
    """$MOESTRO_CACHE, or ~/.cache/moestro."""
    return Path(os.environ.get("MOESTRO_CACHE") or Path.home() / ".cache" / "moestro")

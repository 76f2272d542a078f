"""Which implementation of an operation runs: chosen here and nowhere else."""

from collections.abc import Iterator
from contextlib import contextmanager

BACKENDS = ("fused", "reference")
_active = "fused"


def active() -> str:
    """Name of the backend in force: `fused` (default) or `reference` (the definition, plain autograd)."""
    return _active


@contextmanager
def force(name: str) -> Iterator[None]:
    """Run the body with one backend.

    Raises: ValueError for an unknown name.
    """
    global _active
    if name not in BACKENDS:
        raise ValueError(f"backend={name!r}, allowed: {', '.join(BACKENDS)}")
    before, _active = _active, name
    try:
        yield
    finally:
        _active = before

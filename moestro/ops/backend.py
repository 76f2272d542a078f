"""Which implementation of an operation runs: chosen here and nowhere else."""

from collections.abc import Iterator
from contextlib import contextmanager

# Those that run on every device; `triton` needs CUDA tensors, or Triton's interpreter.
EVERYWHERE = ("fused", "reference")
BACKENDS = (*EVERYWHERE, "triton")
_active = "fused"


def active() -> str:
    """Name of the backend in force.

    - `fused`, the default on every device: custom autograd in plain torch.
    - `reference`: the definition, plain autograd.
    - `triton`: kernels for feed-forward experts (`ops.triton_ffn`); operations without such kernels run as `fused`.
      It is not the default on CUDA tensors, because its speed has not been measured on a GPU yet.
    """
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

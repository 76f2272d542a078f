"""Which implementation of an operation runs: chosen here and nowhere else."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

# Those that run on every device; `triton` needs CUDA tensors, or Triton's interpreter.
EVERYWHERE = ("fused", "reference")
BACKENDS = (*EVERYWHERE, "triton")
_active = "fused"


@dataclass(frozen=True)
class TritonOptions:
    """What the Triton kernels keep. `recompute`: pre-activations are computed again in the backward pass, which adds
    4 d w FLOPs for a row of width w and saves its w or, gated, 2 w numbers. `exact`: hidden rows get the memory that
    they need, for which the host waits for the device once; else as if every row had the greatest width."""

    recompute: bool = False
    exact: bool = False


_triton = TritonOptions()


def active() -> str:
    """Name of the backend in force.

    - `fused`, the default on every device: custom autograd in plain torch.
    - `reference`: the definition, plain autograd.
    - `triton`: kernels for feed-forward experts (`ops.triton_ffn`); operations without such kernels run as `fused`.
      It is not the default on CUDA tensors, because its speed has not been measured on a GPU yet.
    """
    return _active


def triton_options() -> TritonOptions:
    """Options of the backend `triton` in force."""
    return _triton


@contextmanager
def force(name: str, triton: TritonOptions | None = None) -> Iterator[None]:
    """Run the body with one backend, and with other options of the Triton kernels where given.

    Raises: ValueError for an unknown name.
    """
    global _active, _triton
    if name not in BACKENDS:
        raise ValueError(f"backend={name!r}, allowed: {', '.join(BACKENDS)}")
    before = _active, _triton
    _active, _triton = name, triton or _triton
    try:
        yield
    finally:
        _active, _triton = before

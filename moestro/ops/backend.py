"""Which implementation of an operation runs: chosen here and nowhere else."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from moestro.ops import native

# Those that run on every device; `native` needs the compiled library, `triton` CUDA tensors or Triton's interpreter.
EVERYWHERE = ("fused", "reference")
BACKENDS = (*EVERYWHERE, "native", "triton")
NATIVE_DTYPES = (torch.float32, torch.bfloat16)
# Times the mean number of rows of an expert.
SPLIT_FROM = 4
_forced: str | None = None


@dataclass(frozen=True)
class TritonOptions:
    """What the Triton kernels keep. `recompute`: pre-activations are computed again in the backward pass, which adds
    4 d w FLOPs for a row of width w and saves its w or, gated, 2 w numbers. `exact`: hidden rows get the memory that
    they need, for which the host waits for the device once; else as if every row had the greatest width. `few_rows`:
    without gradients and with few rows, kernels that need no sorting. `split`: the rows of an expert with more than
    `SPLIT_FROM` times the mean are summed in parts for its weights' gradients, whose sums are added in a second pass;
    reserves up to half as many partial gradients in float32 as there are experts. Both are not yet measured."""

    recompute: bool = False
    exact: bool = False
    few_rows: bool = False
    split: bool = False


_triton = TritonOptions()


def active() -> str:
    """Name of the backend in force.

    - `native`, the default where the compiled library is loaded (`ops.native`): its kernels where `runs_native` says
      so; everything else runs as `fused`.
    - `fused`, the default elsewhere: custom autograd in plain torch, on every device.
    - `reference`: the definition, plain autograd.
    - `triton`: kernels for feed-forward experts (`ops.triton_ffn`), for experts of one neuron, values and product keys
      (`ops.triton_peer`); operations without such kernels run as `fused`. It is not the default on CUDA tensors,
      because its speed has not been measured on a GPU yet.
    """
    return _forced or ("native" if native.available() else "fused")


def runs_native(*tensors: Tensor) -> bool:
    """Whether an operation that has compiled kernels uses them for these tensors: on the CPU, each in float32 or
    bfloat16. Kernels compute in float32, whatever they read; on tiles, numbers are rounded to bfloat16 before they are
    multiplied where tensors are in bfloat16, and are sums of numbers in bfloat16 where they are in float32
    (`ops.tiled_ffn`). Everything else, float64 above all, runs as `fused`."""
    return active() == "native" and all(v.device.type == "cpu" and v.dtype in NATIVE_DTYPES for v in tensors)


def triton_options() -> TritonOptions:
    """Options of the backend `triton` in force."""
    return _triton


@contextmanager
def force(name: str, triton: TritonOptions | None = None) -> Iterator[None]:
    """Run the body with one backend, and with other options of the Triton kernels where given.

    Raises: ValueError for an unknown name, and for `native` where there is no library, with the reason.
    """
    global _forced, _triton
    if name not in BACKENDS:
        raise ValueError(f"backend={name!r}, allowed: {', '.join(BACKENDS)}")
    if name == "native" and not native.available():
        raise ValueError(f"backend='native': the compiled kernels are {native.status()}")
    before = _forced, _triton
    _forced, _triton = name, triton or _triton
    try:
        yield
    finally:
        _forced, _triton = before

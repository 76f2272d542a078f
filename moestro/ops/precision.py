"""Arithmetic that must not be lowered: the only place that knows of autocast."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def at_least_fp32(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """`x` in float32, or unchanged where it is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def without_autocast(x: Tensor) -> torch.autocast:
    """A context in which products on `x` run in the dtype of their inputs."""
    return torch.autocast(x.device.type, enabled=False)


def linear_fp32(
    x: Float[Tensor, "*b i"], weight: Float[Tensor, "o i"], bias: Float[Tensor, "o"] | None = None
) -> Float[Tensor, "*b o"]:
    """`x @ weight.T + bias` in float32 at least, also under autocast (router scores decide discrete choices)."""
    with without_autocast(x):
        return F.linear(at_least_fp32(x), at_least_fp32(weight), None if bias is None else at_least_fp32(bias))


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which matrix products on `x` run here: autocast's where it is on, else that of `x`."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype

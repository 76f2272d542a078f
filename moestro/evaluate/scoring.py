"""The forward pass over a batch, as training and evaluation both need it: device, precision, nats of the targets."""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moestro.data import IGNORE, Batch
from moestro.layers import adapters_of
from moestro.model import Output


def score(model: nn.Module, batch: Batch, precision: str) -> tuple[Output, Float[Tensor, "b s"]]:
    """The model's output on a batch and -log p of every target (nats), 0 where it is ignored.

    Padding reaches no router: tokens without a target count as such.
    """
    device = next(model.parameters()).device
    # Asked before the batch moves, so that no device is waited for.
    keep, facts = counted(batch, device), told(model, batch)
    batch = batch.to(device)
    with autocast(device, precision), facts:
        output = model(batch.tokens, documents=batch.documents, keep=keep)
    return output, nats(output.logits, batch.targets)


def told(model: nn.Module, batch: Batch) -> AbstractContextManager[None]:
    """The context in which the model's adapters know the groups of the batch's tokens, and which are no padding."""
    adapters = adapters_of(model)
    if adapters is None:
        return nullcontext()
    device = next(model.parameters()).device
    return adapters.given(None if batch.groups is None else batch.groups.to(device), counted(batch, device))


def counted(batch: Batch, device: torch.device) -> Bool[Tensor, "b s"] | None:
    """Which tokens of a batch are no padding, on `device`; None where all are."""
    return None if bool(batch.keep.all()) else batch.keep.to(device)


def nats(logits: Float[Tensor, "b s v"], targets: Int[Tensor, "b s"]) -> Float[Tensor, "b s"]:
    """-log p(target) of every position, 0 where the target is ignored; at least fp32."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    flat = F.cross_entropy(wide.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none")
    return flat.view(targets.shape)


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """The context in which the model's matrix products run in `precision`.

    Raises: ValueError where the device has no bfloat16 autocast.
    """
    check_precision(device, precision)
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def check_precision(device: torch.device, precision: str) -> None:
    """Raises: ValueError where `device` cannot compute in `precision`."""
    if precision == "fp32":
        return
    available = torch.amp.is_autocast_available(device.type)
    if device.type == "cuda":
        available = torch.cuda.is_bf16_supported(including_emulation=False)
    if not available:
        raise ValueError(
            f"precision='bf16': {device} has no bfloat16 autocast; use precision: fp32, or a device that has it "
            "(NVIDIA compute capability 8.0 and later, or a CPU)"
        )


def exact_dtype(device: torch.device) -> torch.dtype:
    """The widest float that `device` has, for sums over many tokens."""
    return torch.float32 if device.type == "mps" else torch.float64

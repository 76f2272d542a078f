"""Training that would not fit into memory, refused before anything is read or written."""

from typing import Any

import torch

from moestro.recipe.resolve import Place
from moestro.train.estimate import MemoryEstimate, estimate_memory
from moestro.train.hardware import free_memory
from moestro.train.settings import TrainSettings

OVERRIDE = "train.check_memory=false starts all the same"
# What makes each part of the estimate smaller.
CHANGES = {
    "parameters": "fewer parameters (model.d_model, model.n_layers, widths, n_experts)",
    "optimizer": "fewer parameters (model.d_model, model.n_layers, widths, n_experts)",
    "gradients": "fewer parameters (model.d_model, model.n_layers, widths, n_experts)",
    "tables": "train.table_precision=bf16, or train.table_folder, which keeps them in files",
    "activations": "a smaller train.batch_size or data.seq_len, a larger train.accumulate, or train.recompute=true",
    "logits": "a smaller train.batch_size or data.seq_len, a larger train.accumulate, or a smaller vocabulary",
}


def require_memory(
    model: Any, vocab_size: int, seq_len: int, settings: TrainSettings, device: str | torch.device, place: Place
) -> None:
    """Refuse what needs more than there is now on `device`, by `estimate_memory`; runs that are spread over ranks
    need less on each, and are planned by `moestro plan`. `model` may lie on the device meta.

    Raises: RecipeError with the estimate, what there is, and what to change.
    """
    there = free_memory(torch.device(device))
    if there is None or not settings.check_memory:
        return
    estimate = estimate_memory(model, vocab_size, seq_len, settings)
    if estimate.total > there:
        raise place.error(told(estimate, there, device))


def told(estimate: MemoryEstimate, there: float, device: str | torch.device) -> str:
    """The message of a refusal."""
    parts = estimate.parts()
    listed = ", ".join(f"{name} {gigabytes(size)}" for name, size in parts.items() if size >= 0.01 * estimate.total)
    largest = max(CHANGES, key=lambda name: parts[name])
    return (
        f"training needs about {gigabytes(estimate.total)} ({listed}), {device} has {gigabytes(there)} free; "
        f"what helps: {CHANGES[largest]}; {OVERRIDE}"
    )


def gigabytes(size: float) -> str:
    """1.5 GB"""
    return f"{size / 1e9:,.1f} GB"

"""Training that would not fit into memory, refused before anything is read or written."""

from collections.abc import Mapping
from typing import Any

import torch

from moestro.recipe.resolve import Place
from moestro.train.estimate import estimate_memory
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
    "parameters and optimizer": "more ranks, parallel.sharding=full, or parallel.experts, which divides experts",
    "gathered weights": "train.accumulate=1, parallel.reshard=true, or parallel.experts, which gathers no experts",
    "exchanged rows": "a smaller train.batch_size or data.seq_len, or a larger train.accumulate",
    "logits": "a smaller train.batch_size or data.seq_len, a larger train.accumulate, or a smaller vocabulary",
}


def require_memory(
    model: Any, vocab_size: int, seq_len: int, settings: TrainSettings, device: str | torch.device, place: Place
) -> None:
    """Refuse what one process needs more of than there is now on `device`, by `estimate_memory`; for several there is
    `moestro.plan.require_ranks_fit`. `model` may lie on the device meta.

    Raises: RecipeError with the estimate, what there is, and what to change.
    """
    there = free_memory(torch.device(device))
    if there is None or not settings.check_memory:
        return
    estimate = estimate_memory(model, vocab_size, seq_len, settings)
    if estimate.total > there:
        raise place.error(told(estimate.parts(), there, str(device)))


def told(parts: Mapping[str, float], there: float, where: str, who: str = "training") -> str:
    """The message of a refusal: bytes by part, of which `where` has so many free."""
    total = sum(parts.values())
    listed = ", ".join(f"{name} {gigabytes(size)}" for name, size in parts.items() if size >= 0.01 * total)
    largest = max(CHANGES, key=lambda name: parts.get(name, 0.0))
    return (
        f"{who} needs about {gigabytes(total)} ({listed}), {where} has {gigabytes(there)} free; "
        f"what helps: {CHANGES[largest]}; {OVERRIDE}"
    )


def gigabytes(size: float) -> str:
    """1.5 GB"""
    return f"{size / 1e9:,.1f} GB"

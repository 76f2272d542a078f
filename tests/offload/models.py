"""Tiny models on disk, and the plans that run them."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from moestro.formats import Checkpoint
from moestro.offload.folders import experts_in
from moestro.offload.session import Plan, Session
from tests.hf.families import in_own_memory, tiny


def tiny_folder(folder: Path, family: str = "mixtral", dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A tiny random model as transformers writes it."""
    tiny(family, dtype=dtype, **changes).save_pretrained(folder)
    return folder


@cache
def in_memory(folder: Path) -> Any:
    """The same model in memory, its experts computed by transformers' own loop."""
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager", dtype="auto")
    return in_own_memory(model.eval())


def memory_for(folder: Path, experts: float, **plan: Any) -> int:
    """Bytes for the model and slots of so many experts, the scratch slot apart."""
    size = experts_in(Checkpoint(folder))[0][0].blob.size
    with Session(folder, Plan(1 << 40, **plan)) as session:
        gates = 0 if session.engine.predictor is None else session.engine.predictor.size
        return session.resident + gates + size + int(size * experts)

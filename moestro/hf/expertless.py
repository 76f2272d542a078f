"""Models of transformers without the tensors of their routed experts, which somebody else keeps."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from moestro.formats import Checkpoint, Fused
from moestro.hf.experts import experts_modules


def load_without_experts(folder: str | Path, device: str | torch.device = "cpu") -> PreTrainedModel:
    """The model in a folder, its own dtype, with everything but routed experts loaded. The modules of experts have no
    parameters: never materialised, neither in memory nor in address space. They compute only inside
    `hf.experts.intercepted`, by a function that has their tensors.

    Raises: FormatError for a folder that is not whole or has no experts; ValueError where a tensor besides the experts'
    is missing.
    """
    checkpoint = Checkpoint(folder)
    config = AutoConfig.from_pretrained(checkpoint.path, local_files_only=True)
    kept = {name: checkpoint.read(name) for name in other_tensors(checkpoint)}
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    with without_experts({type(module) for module in experts_modules(empty).values()}):
        model, found = type(empty).from_pretrained(
            None,
            config=config,
            state_dict=kept,
            dtype=checkpoint.dtype(checkpoint.expert_tensors(checkpoint.moe_layers[0], 0)["down"].name),
            output_loading_info=True,
            experts_implementation="eager",
        )
    if found["missing_keys"]:
        raise ValueError(f"{checkpoint.path} lacks tensors besides experts: {sorted(found['missing_keys'])[:3]}")
    if (checkpoint.path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.path, local_files_only=True)
    return model.to(device).eval()


def tokenizer_in(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder.

    Raises: OSError or ValueError where it has none.
    """
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def other_tensors(checkpoint: Checkpoint) -> list[str]:
    """Names of all tensors that are no routed expert's, in layers that transformers loads."""
    experts, names = checkpoint.family.experts, list(checkpoint.names())
    if isinstance(experts, Fused):
        layers = (*checkpoint.moe_layers, *checkpoint.extra_layers)
        theirs = {stored.name for layer in layers for stored in checkpoint.expert_tensors(layer, 0).values()}
        return [name for name in names if name not in theirs]
    return [name for name in names if not experts.member.match(name)]


@contextmanager
def without_experts(classes: set[type[nn.Module]]) -> Iterator[None]:
    """Inside, modules of these classes are made without their parameters."""
    before = {cls: cls.__init__ for cls in classes}

    def bare(cls: type[nn.Module]) -> Any:
        def made(self: nn.Module, *arguments: Any, **keywords: Any) -> None:
            with torch.device("meta"):
                before[cls](self, *arguments, **keywords)
            for name, _ in list(self.named_parameters(recurse=False)):
                delattr(self, name)
            # nothing is left that transformers could draw at random
            self._is_hf_initialized = True  # type: ignore[assignment]

        return made

    try:
        for cls in classes:
            cls.__init__ = bare(cls)  # type: ignore[method-assign]
        yield
    finally:
        for cls, init in before.items():
            cls.__init__ = init  # type: ignore[method-assign]

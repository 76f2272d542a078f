"""A folder of the Hugging Face format, seen expert by expert."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moestro.formats.complete import layers_of, n_experts, require_complete, stated
from moestro.formats.families import FAMILIES, Family
from moestro.formats.shards import FormatError, Shards, read_json
from moestro.formats.storage import PerExpert, Stored


@dataclass(frozen=True)
class ExpertMatrices:
    """One GLU expert of width w: gate [w d], up [w d], down [d w]; biases [w], [w], [d] where the family has them."""

    gate: Tensor
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None


class Checkpoint:
    """Reads `path` tensor by tensor; nothing is loaded on opening but headers.

    Opening checks that shards, index and headers agree. `family`, and with it everything about experts, checks that
    every layer's experts are complete, numbered without gaps, of one shape, and as many as config.json and the router
    say.

    Raises: FormatError saying what is wrong and where.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise FormatError(f"{self.path} is not a folder")
        self.config: dict[str, Any] = read_json(self.path / "config.json")
        self.shards = Shards(self.path)

    @cached_property
    def family(self) -> Family:
        """Raises: FormatError for a model_type without experts or not known here, and for incomplete experts."""
        kind = str(self.config.get("model_type"))
        if kind not in FAMILIES:
            raise FormatError(f"{self.path}: model_type {kind!r}, allowed: {', '.join(FAMILIES)}")
        family = FAMILIES[kind]
        require_complete(family, self.config, self.shards)
        return family

    def names(self) -> Iterable[str]:
        """Of all tensors."""
        return iter(self.shards)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor."""
        return self.shards[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Of one tensor."""
        return self.shards.dtype(name)

    def file_of(self, name: str) -> str:
        """The shard that holds a tensor."""
        return self.shards[name].file

    def read(self, name: str) -> Tensor:
        """A tensor in its own dtype."""
        return self.shards.read(name)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start:stop of a tensor's first dimension, without reading the others."""
        return self.shards.read(name, slice(start, stop))

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The layers that have experts."""
        return layers_of(self.family, self.config, self.path)

    @cached_property
    def extra_layers(self) -> tuple[int, ...]:
        """Layers from num_hidden_layers on that have experts: multi-token prediction, which transformers drops."""
        layers = {int(found[1]) for name in self.names() if (found := re.match(r"model\.layers\.(\d+)\.", name))}
        beyond = (layer for layer in sorted(layers) if layer >= stated(self.config, "num_hidden_layers", self.path))
        return tuple(layer for layer in beyond if self.family.router.format(layer=layer) in self.shards)

    def n_experts(self, layer: int) -> int:
        """Routed experts of one layer."""
        return n_experts(self.family, layer, self.shards)

    @property
    def top_k(self) -> int:
        """Experts a token visits."""
        return stated(self.config, self.family.top_k_key, self.path)

    def width(self, layer: int) -> int:
        """Hidden units of one routed expert of the layer."""
        experts = self.family.experts
        if isinstance(experts, PerExpert):
            return self.shape(self.shards.matrix(experts.gate.format(layer=layer, expert=0)))[0]
        return self.shape(experts.gate_up.format(layer=layer))[2 if experts.transposed else 1] // 2

    def expert_tensors(self, layer: int, expert: int) -> dict[str, Stored]:
        """{"gate", "up", "down"}, {"gate_bias", ...} where there are biases -> where it is stored."""
        return self.family.experts.locate(layer, expert, self.width(layer))

    def read_stored(self, stored: Stored) -> Tensor:
        """What `stored` says, read without the experts beside it."""
        if stored.expert is None:
            return stored.of(self.read(stored.name))
        return stored.of(self.read_rows(stored.name, stored.expert, stored.expert + 1)[0])

    def expert(self, layer: int, expert: int) -> ExpertMatrices:
        """The matrices of one expert, whichever way the family stores them."""
        return ExpertMatrices(**{k: self.read_stored(v) for k, v in self.expert_tensors(layer, expert).items()})

    def router_tensors(self, layer: int) -> dict[str, str]:
        """{"weight", "bias" and "correction" where there are any} -> name; each has a row for every expert."""
        family = self.family
        names = {"weight": family.router, "bias": family.bias, "correction": family.correction}
        found = {role: name.format(layer=layer) for role, name in names.items() if name is not None}
        return {role: name for role, name in found.items() if name in self.shards}

    def router(self, layer: int) -> dict[str, Tensor]:
        """{"weight" [e d], "bias" [e], "correction" [e]} of one layer, those that there are."""
        return {role: self.read(name) for role, name in self.router_tensors(layer).items()}

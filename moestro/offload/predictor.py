"""Which experts the next layers will want: their routers, asked with this layer's input."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from moestro.formats import Checkpoint, FormatError
from moestro.formats.families import Scoring
from moestro.offload.chosen import Chosen
from moestro.routers.groups import EVERYWHERE, GroupLimit


class Predictor(Protocol):
    """Ids and weights [t, k] expected of each of the layers after one, nearest first; `size` bytes of its own."""

    @property
    def size(self) -> int: ...

    def ahead(self, layer: int, hidden: Tensor, depth: int) -> list[Chosen]: ...


@dataclass(frozen=True)
class Gate:
    """How one layer's router chooses: scores of logits, an additive bias of logits or of the selection, groups."""

    weight: Tensor
    top_k: int
    scoring: Scoring = "softmax"
    bias: Tensor | None = None
    correction: Tensor | None = None
    groups: GroupLimit = EVERYWHERE

    def choose(self, logits: Tensor) -> Chosen:
        """Ids and gate weights [t, k] of logits [t, e], best first. Phi-MoE's sparsemixer, which masks experts far from
        the best one, is taken for softmax."""
        logits = logits if self.bias is None else logits + self.bias.to(logits)
        scores = logits.sigmoid() if self.scoring == "sigmoid" else logits.softmax(-1)
        for_choice = scores if self.correction is None else scores + self.correction.to(scores)
        ids = self.groups(for_choice, for_choice).topk(self.top_k, dim=-1).indices
        return ids, scores.gather(-1, ids)


class StackedGates:
    """One product for all layers that are looked at: the rows of their routers, one after another (Tang 2024,
    arXiv:2411.01433, 3.3). The input is taken as it is: the next layers' norms are not applied.

    `gates` are copied into one tensor of float32 on `device`.
    """

    def __init__(self, gates: Sequence[Gate], device: torch.device | str = "cpu") -> None:
        self.gates = list(gates)
        self._rows = torch.cat([gate.weight.to(device, torch.float32) for gate in gates])
        sizes = torch.tensor([0, *(len(gate.weight) for gate in gates)])
        self._bounds: list[int] = sizes.cumsum(0).tolist()

    @property
    def size(self) -> int:
        """Bytes."""
        return self._rows.nbytes

    def ahead(self, layer: int, hidden: Tensor, depth: int) -> list[Chosen]:
        """Ids and weights [t, k] of up to `depth` layers after `layer`, for its gate's input hidden [t, d]."""
        last = min(len(self.gates) - 1, layer + depth)
        if last <= layer:
            return []
        bounds = self._bounds[layer + 1 : last + 2]
        logits = F.linear(hidden.float(), self._rows[bounds[0] : bounds[-1]])
        each = logits.split([b - a for a, b in zip(bounds, bounds[1:], strict=False)], dim=-1)
        return [gate.choose(part) for gate, part in zip(self.gates[layer + 1 : last + 1], each, strict=True)]


def gates_of(checkpoint: Checkpoint) -> list[Gate]:
    """The routers of a folder, in the order of its layers with experts."""
    family, config = checkpoint.family, checkpoint.config
    groups = EVERYWHERE
    limited = config.get("topk_method", "group_limited_greedy") != "greedy"
    if family.grouped and limited and config.get("n_group") and config.get("topk_group"):
        # DeepSeek-V2 ranks groups by their best expert, V3 (with its correction) by their best two
        best = 1 if family.correction is None else 2
        groups = GroupLimit(config["n_group"], config["topk_group"], best)
    found = []
    for layer in checkpoint.moe_layers:
        tensors = checkpoint.router(layer)
        if "weight" not in tensors:
            raise FormatError(f"{checkpoint.path}: layer {layer} has no router weight")
        bias, correction = tensors.get("bias"), tensors.get("correction")
        found.append(Gate(tensors["weight"], checkpoint.top_k, family.scoring, bias, correction, groups))
    return found

"""The experts of a running model, computed out of slots."""

import copy
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moestro.offload.hosts import Compute
from moestro.offload.loader import Expected, Loader, Served
from moestro.offload.memory import SlotMemory
from moestro.offload.predictor import Chosen, Predictor
from moestro.offload.scorer import Thresholds, wanted
from moestro.offload.trace import Recorder


class Watcher(Protocol):
    """Sees what every expert computes: layer and expert, the module with its tensors, its rows [n d]."""

    def __call__(self, layer: int, expert: int, module: Any, rows: Tensor) -> None: ...


class Engine:
    """Computes a layer's experts as `hf.experts.intercepted` asks for them: (layer, module, hidden [t d], ids [t k],
    weights [t k]) -> [t d].

    Every expert in turn, ascending, is put into a stand-in of the model's own module as its only one, whose own loop
    (`compute`) then does what it does in memory: with every expert in HIGH the output is the same to the last bit.
    `standing` lets matrices in few bits be multiplied as they are stored. Experts that are skipped contribute nothing;
    with `renormalise` the gates of those computed are scaled to the sum that all had.
    """

    def __init__(
        self,
        layers: tuple[int, ...],
        loader: Loader,
        memory: SlotMemory,
        compute: Compute,
        thresholds: Thresholds,
        predictor: Predictor | None = None,
        renormalise: bool = False,
        standing: bool = False,
    ) -> None:
        self.index = {layer: i for i, layer in enumerate(layers)}
        self.loader, self.memory, self.compute, self.thresholds = loader, memory, compute, thresholds
        self.predictor, self.renormalise, self.standing = predictor, renormalise, standing
        self.recorder: Recorder | None = None
        self.watcher: Watcher | None = None
        # layers ahead that a trace tells of
        self.recorded_depth = 0
        self._alone: dict[int, Any] = {}

    def start_sequence(self) -> None:
        """The next tokens belong to another text."""
        self.loader.start_sequence()
        if self.recorder is not None:
            self.recorder.start_sequence()

    @torch.no_grad()
    def __call__(self, layer: int, module: nn.Module, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        index, out = self.index[layer], torch.zeros_like(hidden)
        ahead = self._record(index, hidden, ids, weights)
        kept = torch.zeros_like(ids, dtype=torch.bool)
        alone = self._stand_in(index, module)
        asked = wanted(ids, weights, self.thresholds)
        for served in self.loader.serve(index, asked, lambda: self._expected(index, hidden, ahead)):
            choice, token = torch.where((ids == served.expert).T)
            kept[token, choice] = True
            rows, gates = hidden[token], weights[token, choice, None]
            out.index_add_(0, token, self._expert(index, alone, served, rows, gates).to(out.dtype))
        return out if not self.renormalise else out * _scale(weights, kept)

    def _stand_in(self, index: int, module: nn.Module) -> Any:
        """The module as one of a single expert, without parameters."""
        if index not in self._alone:
            alone: Any = copy.copy(module)
            alone.__dict__ = {**module.__dict__, "_parameters": {}, "num_experts": 1}
            self._alone[index] = alone
        return self._alone[index]

    def _expert(self, index: int, alone: Any, served: Served, rows: Tensor, gates: Tensor) -> Tensor:
        key, device = (index, served.expert), rows.device
        if served.in_place:
            tensors = self.memory.lying(key, served.precision, self.standing)
            rows, gates = rows.cpu(), gates.cpu()
        else:
            tensors = self.memory.tensors(key, served.precision, served.scratch, self.standing)
        alone.__dict__.update({name: tensor[None] for name, tensor in tensors.items()})
        if self.watcher is not None:
            self.watcher(index, served.expert, alone, rows)
        first = torch.zeros(len(rows), 1, dtype=torch.long, device=rows.device)
        out = self.compute(alone, rows, first, gates).to(device)
        # nothing decoded, no slot given up is held on to
        for name in tensors:
            del alone.__dict__[name]
        return out

    def _record(self, index: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> list[Chosen] | None:
        if self.recorder is None:
            return None
        depth = max(self.recorded_depth, self.loader.depth)
        ahead = self.predictor.ahead(index, hidden, depth) if self.predictor else []
        self.recorder.step(index, ids, weights, ahead)
        return ahead

    def _expected(self, index: int, hidden: Tensor, ahead: list[Chosen] | None) -> list[Expected]:
        if self.loader.depth == 0 or self.predictor is None:
            return []
        chosen = self.predictor.ahead(index, hidden, self.loader.depth) if ahead is None else ahead
        pairs = enumerate(chosen[: self.loader.depth], index + 1)
        return [(layer, wanted(ids, weights, self.thresholds)) for layer, (ids, weights) in pairs]


def _scale(weights: Tensor, kept: Tensor) -> Tensor:
    """Sum of all gates of a token over the sum of those whose experts were computed."""
    part = (weights * kept).sum(-1, keepdim=True)
    return torch.where(part.abs() > 0, weights.sum(-1, keepdim=True) / part, torch.ones_like(part)).to(weights.dtype)

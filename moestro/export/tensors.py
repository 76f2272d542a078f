"""The tensors of a checkpoint under the names of a folder."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from moestro.export.modeling import MoestroForCausalLM, stays_wide
from moestro.formats.shards import Shards
from moestro.formats.writer import Outgoing, computed, of_file, of_tensor
from moestro.train.checkpoint import added_tensors, read_state
from moestro.train.tensors import model_tensors


class ExportError(RuntimeError):
    """A model cannot be exported so; the message says why and what else there is."""


class Stored:
    """The tensors of a run's checkpoint, verified, under the names that they have in `MoestroForCausalLM`.

    Raises: CheckpointError where a file is damaged; ExportError where the checkpoint is of another model.
    """

    def __init__(self, checkpoint: Path, model: MoestroForCausalLM) -> None:
        self.state = read_state(checkpoint)
        # a checkpoint keeps its model in one file of the format's own name
        self.shards = Shards(checkpoint)
        own, _ = model_tensors(model.decoder)
        self.names = own_names(model)
        shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
        stored = {name: entry.shape for name, entry in self.shards.items()}
        self.added = added_tensors(checkpoint, stored, own)
        if shapes != stored | {name: tuple(tensor.shape) for name, tensor in self.added.items()}:
            raise ExportError(f"{checkpoint} holds the tensors of another model than its recipe")

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.names))

    def read(self, name: str) -> Tensor:
        """One tensor."""
        own = self.names[name]
        return self.added[own] if own in self.added else self.shards.read(own)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype in which a tensor is stored."""
        own = self.names[name]
        return self.added[own].dtype if own in self.added else self.shards.dtype(own)

    def outgoing(self, name: str, dtype: torch.dtype | None) -> Outgoing:
        """One tensor to be written: byte for byte, or in `dtype` where it is of floating point and not kept wide."""
        if self.names[name] in self.added:
            return of_tensor(name, self.read(name))
        entry, stored = self.shards[self.names[name]], self.dtype(name)
        wanted = stored
        if dtype is not None and stored.is_floating_point:
            wanted = torch.float32 if stays_wide(name, torch.empty(0)) and dtype.itemsize < 4 else dtype
        if wanted == stored:
            return of_file(name, self.shards.folder, entry)
        return computed(name, wanted, entry.shape, partial(cast, name, partial(self.read, name), wanted))


def own_names(model: MoestroForCausalLM) -> dict[str, str]:
    """{name in a folder: name in the decoder} of every tensor that is stored, tied ones once."""
    own, _ = model_tensors(model.decoder)
    first: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        first.setdefault(id(tensor), name)
    return {first[id(tensor)]: name for name, tensor in own.items()}


def cast(name: str, read: Callable[[], Tensor], dtype: torch.dtype) -> Tensor:
    """A tensor in another dtype.

    Raises: ExportError where numbers lie beyond it.
    """
    tensor = read()
    narrow = tensor.to(dtype)
    if not bool(narrow.isfinite().all()) and bool(tensor.isfinite().all()):
        raise ExportError(
            f"{name} has numbers of up to {float(tensor.abs().max()):.3g}, beyond {dtype}: choose another"
        )
    return narrow

"""Folders of our own models: where their tensors lie, by the decoder's names, and what else a session asks."""

from collections.abc import Collection
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from moestro.formats.shards import Entry, header, read_json
from moestro.train import newest_checkpoint
from moestro.train.checkpoint import added_tensors, read_state


class OwnFolder(Protocol):
    """A run, or its export. `config` is a `MoestroConfig`, `tied` the other names of tied tensors, `dtype` that of the
    model in memory (routers keep float32)."""

    path: Path
    config: Any
    tied: dict[str, str]

    dtype: torch.dtype

    @property
    def entries(self) -> dict[str, Entry]: ...

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        ...

    def added(self, wanted: Collection[str]) -> dict[str, Tensor]:
        """Tensors of these names that came after the version that the folder is of."""
        ...

    def tokenizer(self) -> Any: ...


class RunFiles:
    """The newest checkpoint of a run."""

    dtype = torch.float32

    def __init__(self, folder: Path) -> None:
        from moestro.export.opening import configured
        from moestro.recipe.load import load_recipe

        self.path, checkpoint = folder, newest_checkpoint(folder)
        self.tied: dict[str, str] = read_state(checkpoint)["tied"]
        self.file = checkpoint / "model.safetensors"
        self._entries, _ = header(self.file)
        self.recipe = load_recipe(folder / "recipe.yaml")
        self.config: Any = configured(self.recipe, self._entries["embedding.weight"].shape[0])

    @property
    def entries(self) -> dict[str, Entry]:
        return self._entries

    def file_of(self, name: str) -> Path:
        return self.file

    def read(self, name: str) -> Tensor:
        with safe_open(self.file, framework="pt") as stored:
            return stored.get_tensor(name).clone()

    def added(self, wanted: Collection[str]) -> dict[str, Tensor]:
        shapes = {name: tuple(entry.shape) for name, entry in self.entries.items()}
        return added_tensors(self.file.parent, shapes, wanted)

    def tokenizer(self) -> Any:
        from moestro.export.tokenizers import fast_tokenizer

        return fast_tokenizer(self.path / "tokenizer", self.recipe.data.value("seq_len"))


class ExportFiles:
    """A run's export in our own layout, in one file or many."""

    def __init__(self, folder: Path) -> None:
        from moestro.export.exported import ExportedFolder

        self.path, self.folder = folder, ExportedFolder(folder)
        self.config, self.tied, self.dtype = self.folder.config, self.folder.tied, self.folder.dtype

    @property
    def entries(self) -> dict[str, Entry]:
        return self.folder.entries

    def file_of(self, name: str) -> Path:
        return self.path / self.entries[name].file

    def read(self, name: str) -> Tensor:
        return self.folder.read(name)

    def added(self, wanted: Collection[str]) -> dict[str, Tensor]:
        return {}

    def tokenizer(self) -> Any:
        from moestro.hf.expertless import tokenizer_in

        return tokenizer_in(self.path)


def own_folder(folder: Path) -> OwnFolder | None:
    """The run or export in a folder; None for one that is neither."""
    if (folder / "recipe.yaml").is_file():
        return RunFiles(folder)
    config = folder / "config.json"
    if config.is_file() and read_json(config).get("model_type") == "moestro":
        return ExportFiles(folder)
    return None

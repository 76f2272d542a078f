"""An export of a run in our own layout, compressed as the run that it came from, and exported again."""

import shutil
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moestro.compress.source import RunSource, write_run
from moestro.data import Tokenizer, load_tokenizer
from moestro.export import open_model
from moestro.export.exported import RECORD, ExportedFolder
from moestro.export.folder import DTYPES, Choices, export_run
from moestro.model import Transformer
from moestro.ops.whole_files import TEMPORARY, holding
from moestro.recipe.load import Recipe
from moestro.train.durable import empty, publish_folder, write_text
from moestro.train.folder_job import FolderInUse


class ExportedSource(RunSource):
    """Asked as a run is. Computed with in float32, and written in the dtype that it came in."""

    @cached_property
    def folder(self) -> ExportedFolder:
        """Configuration and tensors."""
        return ExportedFolder(self.path)

    @cached_property
    def recipe(self) -> Recipe:
        return self.folder.recipe

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.path)

    @cached_property
    def model(self) -> Transformer:
        return self.folder.model.decoder

    @property
    def config_file(self) -> Path:
        return self.path / "config.json"

    @property
    def record_file(self) -> Path:
        return self.path / RECORD

    @property
    def weights(self) -> tuple[Path, ...]:
        return tuple(self.path / name for name in self.folder.shards.files)

    @property
    def step(self) -> int:
        return self.folder.said.get("step", 0)

    @property
    def counters(self) -> dict[str, Any]:
        return {}

    def loaded(self) -> Transformer:
        return open_model(self.path, dtype=torch.float32).model.decoder  # type: ignore[return-value]

    def read(self, name: str) -> Tensor:
        return self.folder.read(name)

    def write(self, model: nn.Module, recipe: Recipe, texts: Mapping[str, str], destination: Path) -> Path:
        """The export of such a run, with these files beside; complete or not there at all.

        Raises: FolderInUse where another process writes it.
        """
        name = f"{TEMPORARY}{destination.name}.export"
        with holding(destination.with_name(name), FolderInUse(destination)) as temporary:
            empty(temporary)
            # under its own name, which the model card has
            run, out = temporary / destination.name, temporary / "export"
            run.mkdir()
            write_run(self, model, recipe, run)
            dtype = next((name for name, dtype in DTYPES.items() if dtype == self.folder.dtype), "float32")
            export_run(run, out, Choices(dtype=dtype, licence=self.folder.said.get("licence")))
            for file, text in texts.items():
                write_text(out / file, text)
            publish_folder(out, destination)
            shutil.rmtree(temporary)
        return destination

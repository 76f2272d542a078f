"""A folder that `moestro export` wrote in our own layout, read again: recipe, and tensors by the decoder's names."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moestro.export.configuration import MoestroConfig
from moestro.export.modeling import MoestroForCausalLM
from moestro.export.tensors import own_names
from moestro.formats.shards import Entry, FormatError, Shards, read_json
from moestro.recipe.load import Recipe, check_recipe
from moestro.recipe.resolve import Origin
from moestro.train.tensors import model_tensors
from moestro.upgrades import EXPORT

# What an export says of itself.
RECORD = "export.json"


def stored_configuration(file: Path) -> MoestroConfig | None:
    """The configuration of a folder that this package exported, as today's version says it; None of any other.

    Raises: VersionError where a newer moestro wrote it; FormatError where it is no JSON object.
    """
    tree = read_json(file)
    if tree.get("model_type") != MoestroConfig.model_type:
        return None
    return MoestroConfig.from_dict(EXPORT.upgraded(tree, file))


class ExportedFolder:
    """Reads nothing but headers until it is asked.

    Raises: FormatError where the folder is damaged, or holds other tensors than its configuration describes;
    VersionError where a newer moestro wrote it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        config = stored_configuration(self.path / "config.json")
        if config is None or not config.construction:
            raise FormatError(f"{self.path / 'config.json'} has no construction: it is no export of ours")
        self.config = config
        self.shards = Shards(self.path)
        with torch.device("meta"):
            self.model = MoestroForCausalLM(self.config)
        self.names = {own: stored for stored, own in own_names(self.model).items()}
        self.tied = model_tensors(self.model.decoder)[1]
        if missing := [name for name in self.names.values() if name not in self.shards]:
            raise FormatError(f"{self.path} lacks the tensor {missing[0]}")

    @property
    def dtype(self) -> torch.dtype:
        """That of the weights, routers apart."""
        said: Any = self.config.dtype
        return said if isinstance(said, torch.dtype) else torch.float32

    @cached_property
    def said(self) -> dict[str, Any]:
        """What the export recorded of itself; nothing where that file is gone."""
        record = self.path / RECORD
        return json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}

    @cached_property
    def recipe(self) -> Recipe:
        """What the model was trained by; of folders on the machine that did it only the last names.

        Raises: FormatError where config.json has none; RecipeError where it is none.
        """
        if not self.config.recipe:
            raise FormatError(f"{self.path / 'config.json'} has no recipe")
        tree = json.loads(json.dumps(self.config.recipe))
        # keys of JSON are strings
        if "layers" in tree["model"]:
            tree["model"]["layers"] = {int(number): node for number, node in tree["model"]["layers"].items()}
        return check_recipe(Recipe(tree, Origin(self.path / "config.json", tree)))

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """Where every tensor lies, by its name in the decoder; files are relative to the folder."""
        return {own: self.shards[stored] for own, stored in self.names.items()}

    def read(self, name: str) -> Tensor:
        """One tensor, by its name in the decoder."""
        return self.shards.read(self.names[name])

"""Formats of files that outlive the program which wrote them: their versions, and how older ones become today's.

To change a format: write the function that turns its present version into the next, and enter it in the table under the
present number. The new number, reading older files and refusing newer ones follow from that.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Tree = dict[str, Any]
Shapes = Mapping[str, tuple[int, ...]]
# what every release before the first change of a format wrote
FIRST = 1


class VersionError(ValueError):
    """A file is of a version that cannot be read here; the message says which, and what to do."""


@dataclass(frozen=True)
class Format:
    """One kind of file: `key` is where its JSON or YAML says the version. `steps[v]` turns content of version v into
    content of version v + 1, and leaves alone what is that already; `tensors[v]` are the tensors that version v + 1 has
    beside those of version v, by the names and shapes of these. `absent` is the version of content that says none."""

    name: str
    key: str
    steps: Mapping[int, Callable[[Tree], Tree]] = field(default_factory=dict)
    tensors: Mapping[int, Callable[[Shapes], dict[str, Tensor]]] = field(default_factory=dict)
    absent: int | None = None

    @property
    def version(self) -> int:
        """What is written today."""
        return max(self.steps, default=FIRST - 1) + 1

    def version_of(self, content: Mapping[str, Any], file: Path) -> int:
        """The version of content that was read from `file`.

        Raises: VersionError where it says none, is newer than what is known here, or no version at all.
        """
        found = content.get(self.key, self.absent)
        if type(found) is not int or found < FIRST:
            raise VersionError(f"{self.key}={found!r}, allowed: {FIRST} to {self.version} ({file}: {self.key})")
        if found > self.version:
            raise VersionError(
                f"{file} is a {self.name} of format version {found}, written by a newer moestro; this one reads up to "
                f"{self.version}: update moestro, or use the one that wrote it ({file}: {self.key})"
            )
        return found

    def upgraded(self, content: Tree, file: Path) -> Tree:
        """The content as today's version says it; what is of today's version comes back as it is.

        Raises: VersionError.
        """
        for version in range(self.version_of(content, file), self.version):
            content = {**self.steps[version](content), self.key: version + 1}
        return content

    def added(self, version: int, shapes: Shapes) -> dict[str, Tensor]:
        """The tensors that content of an older version lacks, given the names and shapes of those that it has."""
        came: dict[str, Tensor] = {}
        for step in range(version, self.version):
            if step in self.tensors:
                came |= self.tensors[step]({**shapes, **{name: tuple(tensor.shape) for name, tensor in came.items()}})
        return came


def settings_of_version_1(state: Tree) -> Tree:
    """Checkpoints written before rows had settings of their own: theirs were trained as by these."""
    then = {"table_precision": "'fp32'", "optim.skipped_rows": "'keep'", "optim.fused_rows": "False"}
    return {**state, "settings": {**then, **state["settings"]}} if "settings" in state else state


def availability_of_version_1(shapes: Shapes) -> dict[str, Tensor]:
    """Routers written before experts could be absent: all were available, none rested. Names do not tell which routers
    have such masks: readers take those that their model has."""
    routers = {
        found[1]: shape[0]
        for name, shape in shapes.items()
        if (found := re.fullmatch(r"(.*\brouter)\.score\.weight", name))
    }
    masks = {"available": torch.ones, "resting": torch.zeros}
    return {
        f"{router}.{mask}": make(n_experts, dtype=torch.bool)
        for router, n_experts in routers.items()
        for mask, make in masks.items()
        if f"{router}.{mask}" not in shapes
    }


CHECKPOINT = Format(
    "checkpoint", "format_version", steps={1: settings_of_version_1}, tensors={1: availability_of_version_1}
)
# the recipe.yaml of a run folder; recipes written by hand need not say it
RUN = Format("recipe", "format_version", absent=FIRST)
EXPORT = Format("folder for transformers", "format_version", absent=FIRST)
SHARDS = Format("folder of token shards", "format")
COMPARISON = Format("comparison", "format")
PLAN = Format("compression plan", "version")
TRACE = Format("trace of offloading", "version")
STORE = Format("store of LOW copies", "version")

"""A conversion, as a recipe and `key=value` words say it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from moestro.convert.mixture import Mixture
from moestro.convert.parts import PARTS
from moestro.convert.routers import RouterSettings
from moestro.convert.seen import Seen
from moestro.recipe.bind import Binder
from moestro.recipe.load import Paper
from moestro.recipe.resolve import Place, read_tree

BINDER = Binder(PARTS)
# What a method is told of each network.
TOLD = ("total", "importance")


class Method(Protocol):
    """One dense network -> a mixture. `fits_scale`: its scale is fitted once the router is there."""

    @property
    def fits_scale(self) -> bool: ...

    def __call__(self, seen: Seen) -> Mixture: ...


@dataclass(frozen=True)
class Conversion:
    """`method` turns the feed-forward network of each of `layers` (None: all dense ones) into a mixture, whose router
    begins as `router` says. Calibration reads `tokens` tokens of the training text. On the `teacher` stream every layer
    is calibrated with the inputs that it has in the dense model; on the `student` stream with those that it has behind
    converted layers. With `taught` each layer keeps the dense one as a frozen teacher for training (`router_target`).
    `run` changes the run's recipe: its objectives, budget, learning rate."""

    method: Method
    router: RouterSettings = field(default_factory=RouterSettings)
    layers: tuple[int, ...] | None = None
    tokens: int = 8192
    seed: int = 0
    stream: Literal["teacher", "student"] = "teacher"
    taught: bool = False
    run: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.seed < 0:
            raise ValueError(f"tokens={self.tokens}, seed={self.seed}, allowed: at least 1, at least 0")
        if self.stream not in ("teacher", "student"):
            raise ValueError(f"stream={self.stream!r}, allowed: teacher, student")


def load_conversion(path: Path | None, overrides: Sequence[str] = ()) -> Conversion:
    """The conversion of the recipe at `path`, or of the overrides alone.

    Raises: RecipeError naming what is wrong, what is allowed and where.
    """
    tree, origin = read_tree(path, overrides)
    BINDER.bind(Paper, tree.pop("paper", {}), Place(origin, ("paper",))).build()
    return BINDER.bind(Conversion, tree, Place(origin), given=TOLD).build()

"""A recipe, checked against the parts it names: sections, keys and types. Values are checked when things are built."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from moestro.data import TokenData
from moestro.model import Attention, Depths
from moestro.ops.whole_files import require_intact
from moestro.parallel.settings import ParallelSettings
from moestro.recipe.adapt import Adapt
from moestro.recipe.bind import Binder, Part, describe, mapping_at
from moestro.recipe.complete import completed
from moestro.recipe.parts import PARTS
from moestro.recipe.pretrained import PRETRAINED, Pretrained
from moestro.recipe.pretrained import bound as bound_pretrained
from moestro.recipe.resolve import Origin, Place, read_tree
from moestro.recipe.shared_banks import check_names
from moestro.recipe.syntax import RecipeError, dump_yaml
from moestro.train.durable import write_text
from moestro.train.schedules import Scheduled
from moestro.train.settings import OptimSettings, TrainSettings
from moestro.upgrades import RUN

REQUIRED = ("model", "data", "train")
SECTIONS = ("paper", *REQUIRED, "objectives", "rules", "optim", "parallel", "adapt")
# What an objective's entry says besides the objective: its weight, and how that changes.
WEIGHTING = ("weight", "schedule")
# far above any decoder's: blocks are made one by one, even where nothing is allocated
MOST_LAYERS = 10_000
BINDER = Binder(PARTS)


@dataclass(frozen=True)
class Paper:
    """Where a system comes from, and what differs here; for readers only."""

    title: str = ""
    arxiv: str = ""
    differs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Decoder:
    """The `model` section: `ffn` in every block but those that `layers` names by index. `shared_banks` are banks of
    experts by name, which several layers may have as a branch `{kind: shared_bank, name: ...}`, and generators of
    hyper-experts. `depths` lets tokens pass by some of the blocks."""

    d_model: int
    n_layers: int
    attention: Any
    ffn: Any
    layers: dict = field(default_factory=dict)
    shared_banks: dict = field(default_factory=dict)
    depths: Any = None
    tie_embeddings: bool = False
    norm_eps: float = 1e-5
    allow_non_causal: bool = False


@dataclass(frozen=True, eq=False)
class Recipe:
    """A recipe: `tree` is all it says, as plain values; the sections are bound to their constructors.

    Recipes are equal where they say the same once defaults are filled in, wherever they were read from.
    """

    tree: dict
    origin: Origin

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.resolved == other.resolved

    __hash__ = None  # type: ignore[assignment]

    @property
    def name(self) -> str:
        """File name without ending."""
        return self.origin.path.stem

    def write(self, path: Path) -> None:
        """Write the resolved recipe and its version in one step; reading it back gives an equal one."""
        write_text(path, dump_yaml({RUN.key: RUN.version, **self.resolved}))

    @cached_property
    def resolved(self) -> dict[str, Any]:
        """`tree` with the default of every keyword written out."""
        plan = self.model
        kind = PRETRAINED if isinstance(plan, Pretrained) else None
        model = completed(Part(type(plan), vars(plan), Place(self.origin, ("model",)), kind=kind), BINDER)
        return {
            **({"paper": self.tree["paper"]} if "paper" in self.tree else {}),
            "model": model,
            **({"adapt": completed(self.adapt, BINDER)} if self.adapt else {}),
            "data": completed(self.data, BINDER),
            "train": completed(self.train, BINDER),
            "optim": completed(self.optim, BINDER),
            "parallel": completed(self.parallel, BINDER),
            "objectives": [_weighted(weight, completed(part, BINDER)) for _, weight, part in self.objectives],
            "rules": [completed(part, BINDER) for part in self.rules],
        }

    @cached_property
    def model(self) -> Decoder | Pretrained:
        """The keywords of a decoder of ours, or of a pretrained one."""
        node, place = self._section("model")
        if not isinstance(node, dict) or "kind" not in node:
            return self._decoder(node, place)
        if node["kind"] != PRETRAINED:
            raise (place / "kind").error(f"kind={node['kind']!r}, allowed: {PRETRAINED}, or none for a decoder of ours")
        return bound_pretrained(node, place, BINDER)

    def _decoder(self, node: Any, place: Place) -> Decoder:
        """The decoder's keywords; `attention`, `ffn`, `depths`, the values of `layers` and `shared_banks` are parts."""
        plan = Decoder(**BINDER.bind(Decoder, node, place, given=("shared_banks",)).keywords)
        for name in ("d_model", "n_layers"):
            if getattr(plan, name) < 1:
                raise (place / name).error(f"{name}={getattr(plan, name)}, allowed: at least 1")
        if plan.n_layers > MOST_LAYERS:
            raise (place / "n_layers").error(f"n_layers={plan.n_layers}, allowed: at most {MOST_LAYERS}")
        attention = BINDER.bind(Attention, plan.attention, place / "attention", given=("d_model",))
        layers = {key: self._layer(key, node, plan.n_layers) for key, node in plan.layers.items()}
        shared = {name: self._shared_bank(name, node) for name, node in plan.shared_banks.items()}
        check_names(shared, [plan.ffn, *layers.values()], place / "shared_banks")
        depths = plan.depths and BINDER.bind(Depths, plan.depths, place / "depths")
        parts = {"attention": attention, "layers": layers, "shared_banks": shared, "depths": depths}
        return Decoder(**{**vars(plan), **parts})

    def _layer(self, key: Any, node: Any, n_layers: int) -> Part:
        place = Place(self.origin, ("model", "layers", key))
        if key not in range(n_layers):
            raise place.error(f"layer {key!r}, allowed: 0 to {n_layers - 1} (n_layers={n_layers})")
        return BINDER.part("ffn", node, place, given=("d_model", "shared_banks"))

    def _shared_bank(self, name: str, node: Any) -> Part:
        place = Place(self.origin, ("model", "shared_banks", name))
        return BINDER.part("shared_part", node, place, given=("d_model",))

    @cached_property
    def data(self) -> Part:
        """Makes the `TokenData`."""
        return BINDER.bind(TokenData, *self._section("data"))

    @cached_property
    def objectives(self) -> list[tuple[str, float | Part, Part]]:
        """(name, weight, part) of every objective; the name is its kind, a weight with a schedule is a part, too."""
        bound = [self._objective(node, place) for node, place in self._list("objectives")]
        names = [name for name, _, _ in bound]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise Place(self.origin, ("objectives", i)).error(f"objective {name!r} stands twice")
        return bound

    def _objective(self, node: Any, place: Place) -> tuple[str, float | Part, Part]:
        if "weight" not in mapping_at(place, node, "with a kind"):
            raise place.error("missing key 'weight'")
        weight = BINDER.convert(node["weight"], float, place / "weight", "weight")
        if "schedule" in node:
            weight = BINDER.bind(Scheduled, {key: node[key] for key in WEIGHTING}, place)
        rest = {key: value for key, value in node.items() if key not in WEIGHTING}
        return rest.get("kind", ""), weight, BINDER.part("objectives", rest, place)

    @cached_property
    def rules(self) -> list[Part]:
        """Makes the rules, in order."""
        return [BINDER.part("rules", node, place) for node, place in self._list("rules")]

    @cached_property
    def optim(self) -> Part:
        """Makes the `OptimSettings`."""
        return BINDER.bind(OptimSettings, *self._section("optim"))

    @cached_property
    def parallel(self) -> Part:
        """Makes the `ParallelSettings`."""
        return BINDER.bind(ParallelSettings, *self._section("parallel"))

    @cached_property
    def adapt(self) -> Part | None:
        """Makes the `Adapt`, where the recipe has such a section."""
        told = ("d_model", "n_experts")  # a mixture tells its router
        return BINDER.bind(Adapt, *self._section("adapt"), given=told) if "adapt" in self.tree else None

    @cached_property
    def train(self) -> Part:
        """Makes the `TrainSettings`, but for `optim` and `parallel`, which are sections of their own."""
        return BINDER.bind(TrainSettings, *self._section("train"), hidden=("optim", "parallel"))

    @cached_property
    def paper(self) -> Paper:
        """Title, arXiv number and deviations."""
        return BINDER.bind(Paper, *self._section("paper")).build()

    def _section(self, name: str) -> tuple[Any, Place]:
        return self.tree.get(name, {}), Place(self.origin, (name,))

    def _list(self, name: str) -> list[tuple[Any, Place]]:
        node, place = self.tree.get(name, []), Place(self.origin, (name,))
        if not isinstance(node, list):
            raise place.error(f"expected a list of parts; got {describe(node)}")
        return [(item, place / i) for i, item in enumerate(node)]


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe at `path` with `a.b.c=value` overrides, every key and type checked.

    Raises: RecipeError naming what is wrong, what is allowed and where; DamagedFile for that of a run that is not what
    the run wrote.
    """
    require_intact(Path(path).parent, Path(path).name)
    tree, origin = read_tree(Path(path), overrides)
    return check_recipe(Recipe(tree, origin))


def check_recipe(recipe: Recipe) -> Recipe:
    """The same recipe, once every section has been bound.

    Raises: RecipeError.
    """
    top = Place(recipe.origin)
    if "arms" in recipe.tree and "model" not in recipe.tree:
        raise (top / "arms").error(f"a comparison, not a recipe: moestro compare {recipe.origin.path} runs it")
    for name in recipe.tree:
        if name not in SECTIONS:
            raise top.unknown_key(name, (*SECTIONS, "extends"))
    for name in REQUIRED:
        if name not in recipe.tree:
            raise top.error(f"missing key {name!r}")
    for name in SECTIONS:
        getattr(recipe, name)
    return recipe


def _weighted(weight: float | Part, tree: dict) -> dict:
    weighting = completed(weight, BINDER) if isinstance(weight, Part) else {"weight": weight}
    return {"kind": tree["kind"], **weighting, **tree}


__all__ = ["Decoder", "Paper", "Recipe", "RecipeError", "check_recipe", "load_recipe"]

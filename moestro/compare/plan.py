"""What is compared: arms, budgets, sizes and seeds, read strictly from a YAML file."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moestro.recipe.bind import Binder
from moestro.recipe.load import Recipe, load_recipe
from moestro.recipe.parts import PARTS
from moestro.recipe.resolve import Place, read_tree
from moestro.recipe.syntax import RecipeError

BINDER = Binder(PARTS)


@dataclass(frozen=True)
class Arm:
    """One contestant: a recipe, keys set in it, and the key whose value is solved for equal compute.

    `solve` is the dotted key of a whole number that makes the arm's FLOPs per token larger as it grows; its values are
    multiples of `multiple_of`. The reference arm solves nothing: the sizes are its own. `proportional` is as in
    `Sizes`, for keys that this arm has and others do not.
    """

    recipe: str
    title: str = ""
    description: str = ""
    set: dict = field(default_factory=dict)
    proportional: dict = field(default_factory=dict)
    solve: str | None = None
    multiple_of: int = 1


@dataclass(frozen=True)
class Sizes:
    """How the sizes follow from a budget: for each ratio, the width of the reference arm at which the budget buys so
    many `tokens_per_parameter`.

    d_model is a multiple of `d_model_multiple_of`. `proportional` names keys that grow with d_model, as key -> [share,
    multiple]: the value is share * d_model, rounded to a multiple of `multiple`.
    """

    tokens_per_parameter: tuple[float, ...]
    d_model_multiple_of: int = 32
    proportional: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """A whole comparison. `budgets` are useful training FLOPs of one run; `common` keys are set in every arm;
    `evaluations` points make a loss curve; the final figures are of all held-out text, or of `final_tokens` of it."""

    arms: dict
    reference: str
    budgets: tuple[float, ...]
    sizes: Sizes
    title: str = ""
    seeds: tuple[int, ...] = (0,)
    common: dict = field(default_factory=dict)
    evaluations: int = 12
    final_tokens: int | None = None
    threads: int = 1
    path: Path = Path()

    def recipe(self, arm: str, settings: Mapping[str, Any] | None = None) -> Recipe:
        """The recipe of one arm: its file, then `common`, then the arm's own keys, then `settings`."""
        return load_recipe(self.recipe_path(arm), self.overrides(arm, settings or {}))

    @contextmanager
    def blamed(self, arm: str) -> Iterator[None]:
        """Around what is made of an arm's recipe.

        Raises: RecipeError that names the arm.
        """
        try:
            yield
        except RecipeError as error:
            raise RecipeError(f"{error} ({self.path}: arms.{arm})") from error

    def overrides(self, arm: str, settings: Mapping[str, Any]) -> list[str]:
        """The same keys as `key=value`, in order; a later one of the same key wins."""
        keys = {**flat(self.common), **flat(self.arms[arm].set), **settings}
        # JSON is YAML of one line
        return [f"{key}={json.dumps(value)}" for key, value in keys.items()]

    def width_settings(self, arm: str, d_model: int) -> dict[str, int]:
        """d_model and the keys of one arm that grow with it."""
        shares = {**self.sizes.proportional, **self.arms[arm].proportional}
        grown = {key: n * max(1, round(share * d_model / n)) for key, (share, n) in shares.items()}
        return {"model.d_model": d_model, **grown}

    def recipe_path(self, arm: str) -> Path:
        """The recipe file of one arm; relative paths start at the comparison's own folder."""
        return Path(os.path.normpath(self.path.parent / self.arms[arm].recipe))


def budget_name(budget: float) -> str:
    """A budget as runs and their folders are called by it: three digits."""
    return f"{budget:.3g}"


def flat(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """A tree of settings as dotted keys; a part (a mapping with a kind) stays whole and replaces what was there."""
    keys: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict) and "kind" not in value:
            keys |= flat(value, f"{above}{name}.")
        else:
            keys[f"{above}{name}"] = value
    return keys


def load_comparison(path: str | Path, overrides: tuple[str, ...] = ()) -> Comparison:
    """Read a comparison and every recipe it names.

    Raises: RecipeError naming what is wrong, what is allowed and where.
    """
    tree, origin = read_tree(Path(path), overrides)
    top = Place(origin)
    if "model" in tree and "arms" not in tree:
        raise (top / "model").error(f"a recipe, not a comparison: moestro train {path} trains it")
    bound = BINDER.bind(Comparison, tree, top, hidden=("path",))
    plan = bound.build()
    arms = {name: BINDER.bind(Arm, node, top / "arms" / name).build() for name, node in plan.arms.items()}
    plan = Comparison(**{**vars(plan), "arms": arms, "path": Path(path)})
    _check(plan, top)
    return plan


def _check(plan: Comparison, top: Place) -> None:
    if plan.reference not in plan.arms:
        raise (top / "reference").error(f"reference={plan.reference!r}, allowed: {', '.join(map(str, plan.arms))}")
    if plan.arms[plan.reference].solve is not None:
        raise (top / "arms" / plan.reference / "solve").error("the reference arm gives the sizes and solves nothing")
    if not plan.seeds or len(set(plan.seeds)) < len(plan.seeds) or min(plan.seeds) < 0:
        allowed = "at least one, none twice, none below 0"
        raise (top / "seeds").error(f"seeds={list(plan.seeds)}, allowed: {allowed}")
    if not plan.budgets or min(plan.budgets) <= 0:
        raise (top / "budgets").error(f"budgets={list(plan.budgets)}, allowed: FLOPs above 0, at least one number")
    if len({budget_name(budget) for budget in plan.budgets}) < len(plan.budgets):
        allowed = "none twice in its first three digits, which name its runs"
        raise (top / "budgets").error(f"budgets={list(plan.budgets)}, allowed: {allowed}")
    ratios = plan.sizes.tokens_per_parameter
    if not ratios or min(ratios) <= 0:
        raise (top / "sizes" / "tokens_per_parameter").error(f"got {list(ratios)}, allowed: numbers above 0")
    for key in ("evaluations", "threads", "final_tokens"):
        value = getattr(plan, key)
        if value is not None and value < 1:
            raise (top / key).error(f"{key}={value}, allowed: at least 1")
    if plan.sizes.d_model_multiple_of < 1:
        place = top / "sizes" / "d_model_multiple_of"
        raise place.error(f"d_model_multiple_of={plan.sizes.d_model_multiple_of}, allowed: at least 1")
    _check_shares(plan.sizes.proportional, top / "sizes" / "proportional")
    for name, arm in plan.arms.items():
        if arm.multiple_of < 1:
            raise (top / "arms" / name / "multiple_of").error(f"multiple_of={arm.multiple_of}, allowed: at least 1")
        _check_shares(arm.proportional, top / "arms" / name / "proportional")
    _check_same_data(plan, top)


def _check_shares(shares: Mapping[str, Any], place: Place) -> None:
    for key, value in shares.items():
        pair = isinstance(value, list) and len(value) == 2
        numbers = pair and isinstance(value[0], int | float) and type(value[1]) is int
        if not numbers or min(value) <= 0 or not math.isfinite(value[0]):
            raise (place / key).error(f"got {value!r}, allowed: [share of d_model, whole number to round to]")


def _check_same_data(plan: Comparison, top: Place) -> None:
    reference = plan.recipe(plan.reference).tree["data"]
    for name in plan.arms:
        try:
            data = plan.recipe(name).tree["data"]
        except RecipeError as error:
            raise (top / "arms" / name).error(str(error)) from error
        if data != reference:
            message = f"data differs from that of the reference arm {plan.reference!r}; losses would not compare"
            raise (top / "arms" / name).error(message)

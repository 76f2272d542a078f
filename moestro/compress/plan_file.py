"""Plans in JSON: strict to read, so that a plan edited by hand means what it says."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moestro.compress.plan import Plan, PlanError, TensorFile
from moestro.ops.whole_files import sha256
from moestro.recipe.bind import Binder
from moestro.recipe.resolve import Origin, Place
from moestro.recipe.syntax import RecipeError
from moestro.train.durable import write_text
from moestro.upgrades import PLAN, VersionError


def write_plan(plan: Plan, path: Path) -> Path:
    """Write a plan in one step; the same plan gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, plan_text(plan))
    return path


def plan_text(plan: Plan) -> str:
    """A plan as JSON, lists of numbers on one line."""
    return _dumped({PLAN.key: PLAN.version, **asdict(plan)}, "") + "\n"


def read_plan(path: Path, whole: bool = True) -> Plan:
    """The plan at `path`, checked, with the hash of the tensors beside it where it has any; without `whole` these need
    not be there, as they are not in a compressed folder.

    Raises: PlanError naming the file and the key, what was there and what is allowed.
    """
    tree = _parsed(path)
    try:
        tree = PLAN.upgraded(tree, path)
        del tree[PLAN.key]
        plan = Binder({}).bind(Plan, tree, Place(Origin(path, tree))).build()
    except (RecipeError, VersionError) as error:
        raise PlanError(str(error)) from error
    if whole and plan.tensors is not None:
        tensor_file(path, plan.tensors)
    return plan


def tensor_file(plan_path: Path, tensors: TensorFile) -> Path:
    """Where the tensors of a plan lie.

    Raises: PlanError where they do not, or are other ones.
    """
    path = plan_path.parent / tensors.file
    if not path.is_file():
        raise PlanError(f"{path} is missing, which the plan needs ({plan_path}: tensors.file)")
    found = sha256(path)
    if found != tensors.sha256:
        raise PlanError(f"{path} has sha256 {found}, expected {tensors.sha256} ({plan_path}: tensors.sha256)")
    return path


def _parsed(path: Path) -> dict:
    def unique(pairs: list[tuple[str, Any]]) -> dict:
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise PlanError(f"key {twice[0]!r} stands twice ({path})")
        return dict(pairs)

    def refuse(word: str) -> None:
        raise PlanError(f"{word} is no number that a plan may have ({path})")

    try:
        text = path.read_text(encoding="utf-8")
        tree = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except FileNotFoundError:
        raise PlanError(f"no such plan: {path}") from None
    except PlanError:
        raise
    except (OSError, ValueError) as error:
        raise PlanError(f"cannot read the plan: {error} ({path})") from error
    if not isinstance(tree, dict):
        raise PlanError(f"a plan is a mapping of keys to values, got {type(tree).__name__} ({path})")
    return tree


def _dumped(value: Any, indent: str) -> str:
    """JSON with one line for each entry of a mapping and each mapping of a list."""
    deeper = indent + " "
    if isinstance(value, dict) and value:
        entries = [f"{deeper}{json.dumps(str(key))}: {_dumped(item, deeper)}" for key, item in value.items()]
    elif isinstance(value, Sequence) and not isinstance(value, str) and any(isinstance(item, dict) for item in value):
        entries = [deeper + _dumped(item, deeper) for item in value]
    else:
        return json.dumps(value, allow_nan=False)
    open_, close = "{}" if isinstance(value, dict) else "[]"
    return f"{open_}\n" + ",\n".join(entries) + f"\n{indent}{close}"

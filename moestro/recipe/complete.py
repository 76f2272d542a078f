"""A bound recipe -> plain values again, every default written out: what a run says about itself, years later."""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

from moestro.recipe.bind import EXPERTS, NO_DEFAULT, ROUTING_FACTS, SHARED, SHARED_BANKS, Binder, Part, parameters
from moestro.recipe.resolve import ONE_OF

PLAIN = (bool, int, float, str, type(None))


class NotPlain(Exception):
    """A value that YAML has no words for."""


def completed(part: Part, binder: Binder, inherited: frozenset[str] = SHARED, slot: str = "") -> dict[str, Any]:
    """The mapping from which `binder` binds an equal part, with the defaults of every keyword that takes plain values
    or a part. Left out are keywords that the part inherits from around it (`inherited`) and does not set itself."""
    known = parameters(part.make)
    tree = {} if part.kind is None else {"kind": part.kind}
    for name in known:
        if name in part.keywords:
            tree[name] = plain(part.keywords[name], binder, _told(part.make, name, inherited), name)
        elif name not in inherited and name not in part.hidden and slot not in ONE_OF:
            tree |= _default(part, name, binder, inherited)
    return tree


def plain(value: Any, binder: Binder, inherited: frozenset[str] = SHARED, slot: str = "") -> Any:
    """A bound value as YAML has it.

    Raises: NotPlain.
    """
    if isinstance(value, Part):
        return completed(value, binder, inherited, slot)
    if is_dataclass(value):
        return plain(vars(value), binder, inherited)
    if isinstance(value, Mapping):
        return {key: plain(item, binder, inherited) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, list | tuple):
        return [plain(item, binder, inherited) for item in value]
    if isinstance(value, Path):
        return str(value)
    if type(value) not in PLAIN:
        raise NotPlain(value)
    return value


def _told(make: Callable[..., Any], name: str, inherited: frozenset[str]) -> frozenset[str]:
    """What the parts in the keyword `name` inherit."""
    if name in (EXPERTS, SHARED_BANKS):
        return inherited | ROUTING_FACTS
    return inherited | {"n_experts"} if EXPERTS in parameters(make) else inherited


def _default(part: Part, name: str, binder: Binder, inherited: frozenset[str]) -> dict[str, Any]:
    """{name: default}, empty where there is none or it is not plain."""
    parameter, place = parameters(part.make)[name], part.place / name
    factory = _factories(part.make).get(name)
    kinds = {make: kind for kind, make in binder.parts.get(name, {}).items()}
    if factory is not None and factory in kinds:
        return {name: completed(binder.part(name, {"kind": kinds[factory]}, place), binder, inherited)}
    default = factory() if factory else parameter.default
    if default is NO_DEFAULT:
        return {}
    try:
        node = plain(default, binder)
    except NotPlain:
        return {}
    # through the binder, so that a default of 1 is the number 1.0 where a recipe's 1 is
    return {name: plain(binder.convert(node, parameter.annotation, place, name), binder)}


def _factories(make: Callable[..., Any]) -> dict[str, Callable[[], Any]]:
    if not is_dataclass(make):
        return {}
    return {entry.name: entry.default_factory for entry in fields(make) if entry.default_factory is not MISSING}

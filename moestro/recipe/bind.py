"""Plain recipe values -> checked keywords of constructors: the constructors' signatures are the schema."""

import inspect
import math
import re
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from moestro.recipe.resolve import Place
from moestro.recipe.syntax import RecipeError, unknown

Parts = Mapping[str, Mapping[str, Callable[..., Any]]]
SCALARS = {bool: "true or false", int: "a whole number", float: "a number", str: "a word", type(None): "null"}
# Keywords that a constructor's parts inherit from it, and the slot whose parts know the number of experts.
SHARED = frozenset({"d_model"})
EXPERTS = "branches"
# The decoder's keyword for experts that several layers hold.
SHARED_BANKS = "shared_banks"
# What experts are told about the router that weights them.
ROUTING_FACTS = frozenset({"heads", "top_k", "gate"})
# What errors say of a value: `top_k=9 > 8 experts`, `train seed=-1: must not be negative`.
NAMED = re.compile(r"\b[a-z]\w*(?==)")
BEGINS_WITH = re.compile(r"(?:[a-z]\w* )*([a-z]\w*)=")
# How constructors refuse values: their own checks, files, and sizes for which torch has no numbers or no memory.
REFUSALS = (ValueError, OSError, RuntimeError, ArithmeticError, MemoryError)
NO_DEFAULT = inspect.Parameter.empty


@dataclass(frozen=True)
class Part:
    """A constructor with checked keywords, not called yet. `kind` is its name in a slot of the vocabulary, `hidden` are
    the keywords that a recipe does not give."""

    make: Callable[..., Any]
    keywords: dict[str, Any]
    place: Place
    missing: frozenset[str] = frozenset()
    hidden: frozenset[str] = frozenset()
    kind: str | None = None

    def value(self, name: str) -> Any:
        """A keyword's value: what the recipe gives, else the constructor's default."""
        return self.keywords[name] if name in self.keywords else parameters(self.make)[name].default

    def build(self, context: Mapping[str, Any] | None = None) -> Any:
        """Call the constructor, parts inside first. Keywords that the recipe does not give come from `context`.

        Raises: RecipeError with the place where the constructor refuses its values.
        """
        keywords: dict[str, Any] = {}
        context = dict(context or {}) | {name: self.keywords[name] for name in SHARED & self.keywords.keys()}
        # experts first: they tell the router how many they are, and the router tells them how it weights
        for name in sorted(self.keywords, key=lambda name: name != EXPERTS):
            inside = context | (_routing_facts(self.keywords) if name == EXPERTS else _expert_facts(keywords))
            wants_maker = get_origin(parameters(self.make)[name].annotation) is Callable
            keywords[name] = (maker if wants_maker else built)(self.keywords[name], inside)
        keywords |= {name: context[name] for name in parameters(self.make) if name in context and name not in keywords}
        if absent := sorted(self.missing - keywords.keys()):
            raise self.place.error(f"missing key {absent[0]!r}")
        try:
            return self.make(**keywords)
        except RecipeError:
            raise
        except REFUSALS as error:
            message = (str(error) or type(error).__name__).splitlines()[0]
            if not isinstance(error, ValueError | OSError) and not type(error).__module__.startswith("moestro"):
                message = f"{_culprit(keywords, message)}: cannot be computed with ({message})"
            raise self.blamed(message).error(message) from error

    def blamed(self, message: str) -> Place:
        """Where to look for what a message is about: of the keywords that it names as `key=value`, one that the command
        line gives, else the one it begins with; else this part."""
        named = {match[0]: self._spot(match[0]) for match in NAMED.finditer(message)}
        spots = [spot for spot in named.values() if spot is not None]
        changed = [spot for spot in spots if spot.origin.overridden(spot.keys)]
        first = BEGINS_WITH.match(message)
        return (changed or [(first and named.get(first[1])) or self.place])[0]

    def _spot(self, name: str) -> Place | None:
        """Where the recipe gives a keyword of this part, or of the one part inside it that has such a keyword."""
        if name in self.keywords:
            return self.place / name
        inside = [part._spot(name) for part in self.keywords.values() if isinstance(part, Part)]
        spots = [spot for spot in inside if spot is not None]
        return spots[0] if len(spots) == 1 else None


def _culprit(keywords: Mapping[str, Any], message: str) -> str:
    """`d_model=1000000`: the number that torch's message quotes, else the one that is most likely to be too large."""
    numbers = {name: value for name, value in keywords.items() if type(value) in (int, float)}
    quoted = [
        name for name, value in numbers.items() if re.search(rf"(?<![\w.-]){re.escape(str(value))}(?!\w|\.\d)", message)
    ]
    name = (quoted or sorted(numbers, key=lambda name: -abs(numbers[name])) or [""])[0]
    return f"{name}={numbers[name]}" if name else "a size"


def _expert_facts(built_so_far: Mapping[str, Any]) -> dict[str, int]:
    counts = [branch.n_experts for branch in built_so_far.get(EXPERTS, ()) if hasattr(branch, "n_experts")]
    return {"n_experts": counts[0]} if counts else {}


def _routing_facts(keywords: Mapping[str, Any]) -> dict[str, Any]:
    router = keywords.get("router")
    if not isinstance(router, Part):
        return {}
    facts = {name: router.value(name) for name in ROUTING_FACTS & parameters(router.make).keys()}
    return {name: fact for name, fact in facts.items() if fact is not NO_DEFAULT}


def built(value: Any, context: Mapping[str, Any]) -> Any:
    """`value` with every part inside it built."""
    if isinstance(value, Part):
        return value.build(context)
    if isinstance(value, list | tuple):
        return type(value)(built(item, context) for item in value)
    return value


def maker(part: Part, context: Mapping[str, Any]) -> Callable[..., Any]:
    """What a constructor gets that asks for a maker of parts (`Callable[..., Router]`): it says itself how many experts
    or how wide a model each of them has."""
    return lambda **told: part.build({**context, **told})


class Binder:
    """Binds recipe mappings to constructors. `parts` is the vocabulary: slot (a constructor's keyword) -> kind -> part.

    A keyword that is a slot takes `{kind: ..., ...}`, or a list of them; every other keyword takes plain values of the
    annotated type, where a dataclass is a mapping of its own keywords.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts

    def bind(
        self,
        make: Callable[..., Any],
        node: Any,
        place: Place,
        given: Collection[str] = (),
        hidden: Collection[str] = (),
    ) -> Part:
        """Check the mapping `node` against the signature of `make`.

        `given` names keywords that the builder supplies where the recipe does not, `hidden` those it alone supplies.

        Raises: RecipeError for unknown and missing keys and for wrong types.
        """
        mapping_at(place, node)
        known = {name: hint for name, hint in parameters(make).items() if name not in hidden}
        for key in node:
            if key not in known:
                raise place.unknown_key(key, known)
        inherited = {*given, *(SHARED & known.keys())}
        told = inherited | {"n_experts"} if EXPERTS in known else inherited
        keywords = {}
        for key, value in node.items():
            inside = inherited if key == EXPERTS else told
            keywords[key] = self.convert(value, known[key].annotation, place / key, str(key), inside)
        absent = {name for name, parameter in known.items() if parameter.default is NO_DEFAULT} - keywords.keys()
        for name in known:
            if name in absent and name not in given:
                raise place.error(f"missing key {name!r}")
        return Part(make, keywords, place, frozenset(absent), frozenset(hidden))

    def part(self, slot: str, node: Any, place: Place, given: Collection[str] = ()) -> Part:
        """Bind `{kind: ..., ...}` to the constructor that `kind` names in a slot of the vocabulary."""
        kinds = self.parts[slot]
        if "kind" not in mapping_at(place, node, "with a kind"):
            raise place.error(f"missing key 'kind'; allowed: {', '.join(sorted(kinds))}")
        if not isinstance(node["kind"], str) or node["kind"] not in kinds:
            raise (place / "kind").error(unknown("kind", node["kind"], kinds))
        rest = {key: value for key, value in node.items() if key != "kind"}
        return replace(self.bind(kinds[node["kind"]], rest, place, given), kind=node["kind"])

    def convert(self, value: Any, hint: Any, place: Place, slot: str, given: Collection[str] = ()) -> Any:
        """`value` as the annotation `hint` wants it.

        Raises: RecipeError for any other type.
        """
        if slot in self.parts and isinstance(value, dict):
            return self.part(slot, value, place, given)
        kind, arguments = get_origin(hint), get_args(hint)
        if kind is Annotated:
            return self.convert(value, arguments[0], place, slot, given)
        if kind in (Union, types.UnionType):
            return self._one_of(value, arguments, place, slot, given)
        if kind is Literal:
            return _literal(value, arguments, place)
        if isinstance(kind, type) and issubclass(kind, Collection) and not issubclass(kind, Mapping):
            return self._sequence(value, kind, arguments, place, slot, given)
        if kind is dict or hint is dict:
            return mapping_at(place, value)
        if isinstance(hint, type) and is_dataclass(hint):
            return self.bind(hint, value, place, given)
        return self._leaf(value, hint, place, slot)

    def _leaf(self, value: Any, hint: Any, place: Place, slot: str) -> Any:
        if hint in SCALARS:
            return _scalar(value, hint, place)
        if hint is Path and isinstance(value, str):
            return Path(value)
        if slot in self.parts:
            raise self._not_a_part(value, place, slot)
        if hint is Any:
            return value
        raise place.error(f"cannot be set in a recipe: {_name(hint)} is neither a plain value nor a part")

    def _not_a_part(self, value: Any, place: Place, slot: str) -> RecipeError:
        kinds = ", ".join(sorted(self.parts[slot]))
        return place.error(f"expected a mapping with one kind of {kinds}; got {describe(value)}")

    def _one_of(self, value: Any, hints: Sequence[Any], place: Place, slot: str, given: Collection[str]) -> Any:
        if value is None and type(None) in hints:
            return None
        real = [hint for hint in hints if hint is not type(None)]
        refused: list[RecipeError] = []
        # whole numbers first, so that `int | float` keeps what was written
        for hint in sorted(real, key=lambda hint: hint is not int):
            try:
                return self.convert(value, hint, place, slot, given)
            except RecipeError as error:
                refused.append(error)
        if len(refused) == 1:
            raise refused[0]
        if slot in self.parts:
            raise self._not_a_part(value, place, slot)
        allowed = " or ".join(_name(hint) for hint in real)
        raise place.error(f"expected {allowed}; got {describe(value)}")

    def _sequence(
        self, value: Any, kind: type, hints: Sequence[Any], place: Place, slot: str, given: Collection[str]
    ) -> Any:
        if not isinstance(value, list):
            raise place.error(f"expected a list; got {describe(value)}")
        fixed = kind is tuple and Ellipsis not in hints
        if fixed and len(value) != len(hints):
            raise place.error(f"expected a list of {len(hints)} values; got {len(value)}")
        each = hints if fixed else [hints[0]] * len(value)
        items = [
            self.convert(item, hint, place / i, slot, given)
            for i, (item, hint) in enumerate(zip(value, each, strict=True))
        ]
        return kind(items) if kind in (tuple, set, frozenset) else items


def parameters(make: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The keywords a constructor takes, by name; a module without a constructor of its own takes none."""
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = inspect.signature(make).parameters.items()
    return {name: parameter for name, parameter in named if parameter.kind not in several}


def _scalar(value: Any, hint: type, place: Place) -> Any:
    if hint is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if type(value) is hint and hint is not float:
        return value
    raise place.error(f"expected {SCALARS[hint]}; got {describe(value)}")


def _literal(value: Any, allowed: Sequence[Any], place: Place) -> Any:
    if any(value == choice and type(value) is type(choice) for choice in allowed):
        return value
    if isinstance(value, str):
        raise place.error(unknown("value", value, allowed))
    raise place.error(f"expected one of {', '.join(map(str, allowed))}; got {describe(value)}")


def mapping_at(place: Place, value: Any, of: str = "of keys to values") -> dict:
    """Raises: RecipeError where the value at `place` is no mapping."""
    if not isinstance(value, dict):
        raise place.error(f"expected a mapping {of}; got {describe(value)}")
    return value


def describe(value: Any) -> str:
    """A value and its type, in a recipe's terms."""
    if isinstance(value, dict | list):
        return f"a {'mapping' if isinstance(value, dict) else 'list'} of {len(value)}"
    if value is None:
        return "null"
    shown = str(value).lower() if isinstance(value, bool) else repr(value)
    return f"{shown} ({SCALARS.get(type(value), type(value).__name__)})"


def _name(hint: Any) -> str:
    if hint in (*SCALARS, Path):
        return SCALARS.get(hint, "a path")
    origin = get_origin(hint)
    if isinstance(origin, type) and issubclass(origin, Collection):
        return "a list"
    return getattr(hint, "__name__", str(hint))

"""Strict YAML: text -> plain values, with errors that name line and column."""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

# levels of mappings and lists; the largest whole number, and characters of one that may still be read
DEEPEST, LARGEST, LONGEST_NUMBER = 64, 2**63 - 1, 64


class RecipeError(ValueError):
    """Something a recipe must not say; the message ends with the place where it says so."""


class RecipeLoader(yaml.SafeLoader):
    """YAML 1.2's core types (so `1e-3` is a number and `no` a word), no anchors, no tags, no key twice, numbers of 64
    bits."""

    yaml_implicit_resolvers: dict = {}
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > DEEPEST:
            raise _mistake(f"nested more than {DEEPEST} levels deep", self.peek_event().start_mark)
        try:
            return self._composed(parent, index)
        finally:
            self.depth -= 1

    def _composed(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if getattr(event, "anchor", None):
            raise yaml.MarkedYAMLError(
                problem="anchors and aliases are not part of recipes; use `extends`",
                problem_mark=event.start_mark,
            )
        if getattr(event, "tag", None):
            raise _mistake(f"tags such as {event.tag} are not part of recipes", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int) or isinstance(key, bool):
                raise _mistake(f"key {key!r} is neither a word nor a whole number", key_node.start_mark)
            if key in seen:
                raise _mistake(f"key {key!r} stands twice, first on line {seen[key]}", key_node.start_mark)
            seen[key] = key_node.start_mark.line + 1
        return super().construct_mapping(node, deep=deep)


class RecipeDumper(yaml.SafeDumper):
    """Writes what `RecipeLoader` reads back as the same values."""

    yaml_implicit_resolvers: dict = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _mistake(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def _teach(tag: str, pattern: str, first: list[str]) -> None:
    for kind in (RecipeLoader, RecipeDumper):
        kind.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(pattern), first)


_teach("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF"))
_teach("null", r"^(?:~|null|Null|NULL|)$", [*"~nN", ""])
_teach("int", r"^[-+]?[0-9]+(?:_[0-9]+)*$", list("-+0123456789"))
_teach("float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:_[0-9]+)*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", list("-+.0123456789"))
RecipeLoader.add_constructor("tag:yaml.org,2002:int", lambda _, node: _whole(node))
RecipeLoader.add_constructor("tag:yaml.org,2002:float", lambda _, node: float(node.value))


def _whole(node: Any) -> int:
    # Python reads no number of thousands of digits, and tensors have sizes of 64 bits
    value = int(node.value) if len(node.value) <= LONGEST_NUMBER else LARGEST + 1
    if abs(value) > LARGEST:
        shown = node.value if len(node.value) <= 2 * LONGEST_NUMBER else f"{node.value[:LONGEST_NUMBER]}..."
        raise _mistake(f"{shown} is too large; allowed: whole numbers up to {LARGEST}", node.start_mark)
    return value


def nearest(got: object, allowed: Iterable[object]) -> str:
    """`; did you mean 'top_k'?`, or nothing where no name is near."""
    near = difflib.get_close_matches(str(got), [str(name) for name in allowed], n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def unknown(what: str, got: object, allowed: Iterable[object]) -> str:
    """The sentence that refuses a name: the nearest one, and all that are allowed."""
    names = sorted(map(str, allowed))
    hint = nearest(got, names) or ";"
    return f"unknown {what} {got!r}{hint} allowed: {', '.join(names) or 'none'}"


def read_yaml(path: Path) -> dict:
    """One strict YAML file whose top level is a mapping.

    Raises: RecipeError for a missing file, for YAML that does not parse and for a key twice, with line and column.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(_no_such_file(path)) from None
    # ValueError: bytes that are no UTF-8, a path with a null byte
    except (OSError, ValueError) as error:
        raise RecipeError(f"cannot read the recipe: {error} ({path})") from error
    tree = parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise RecipeError(f"a recipe is a mapping of keys to values, got {type(tree).__name__} ({path})")
    return tree


def parse_yaml(text: str, where: str) -> Any:
    """The value a piece of strict YAML stands for.

    Raises: RecipeError naming line and column in `where`.
    """
    try:
        return yaml.load(text, RecipeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        spot = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "unknown line"
        problem = error.problem or error.context
        raise RecipeError(f"YAML: {problem} ({where}: {spot})") from error
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        raise RecipeError(
            f"YAML: character #x{ord(text[error.position]):04x} is not allowed ({where}: line {line}, column {column})"
        ) from error


def dump_yaml(tree: dict) -> str:
    """`tree` as YAML that `parse_yaml` reads back unchanged."""
    return yaml.dump(tree, Dumper=RecipeDumper, sort_keys=False, allow_unicode=True, width=110)


def _no_such_file(path: Path) -> str:
    by_name = {near.stem: near for folder in (Path("recipes"), path.parent) for near in sorted(folder.glob("*.yaml"))}
    near = difflib.get_close_matches(path.stem, by_name, n=1)
    return f"no such recipe: {path}" + (f"; did you mean {by_name[near[0]]}?" if near else "")

"""A recipe file -> one plain dict: `extends`, overrides, and where each value came from."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moestro.recipe.syntax import RecipeError, parse_yaml, read_yaml, unknown
from moestro.upgrades import RUN, VersionError

Key = str | int
Keys = tuple[Key, ...]
# Mappings of which exactly one key is meant: a new one replaces the old one instead of standing beside it.
ONE_OF = frozenset({"budget"})
# Mappings whose values, where an override sets a part of one that is not there yet, start as another value of the tree:
# model.layers.2.branches.0.widths=[8, 16] makes block 2 like the other blocks, but for these widths.
STARTS_AS: dict[Keys, Keys] = {("model", "layers"): ("model", "ffn")}


@dataclass(frozen=True)
class Origin:
    """The file a recipe was read from, the one it extends, and what the command line changed."""

    path: Path
    own: dict
    base_path: Path | None = None
    base: dict | None = None
    overrides: tuple[Keys, ...] = ()

    def overridden(self, keys: Keys) -> bool:
        """Whether the command line gives the value at `keys`."""
        return any(keys[: len(override)] == override for override in self.overrides)

    def where(self, keys: Keys) -> str:
        """`file: dotted.path`, naming the file (or the command line) in which the value stands.

        Where the command line changed something below `keys`, those changes are named.
        """
        dotted = ".".join(map(str, keys)) or "top level"
        if self.overridden(keys):
            return f"command line: {dotted}"
        below = [".".join(map(str, override)) for override in self.overrides if keys and override[: len(keys)] == keys]
        if below:
            return f"command line: {', '.join(dict.fromkeys(below))}"
        written = self._written(keys)
        in_base = self.base is not None and not has(self.own, written) and has(self.base, written)
        return f"{self.base_path if in_base else self.path}: {'.'.join(map(str, written)) or 'top level'}"

    def _written(self, keys: Keys) -> Keys:
        """Where a file says what an override copied."""
        for above, pattern in STARTS_AS.items():
            name = len(above) + 1
            if keys[: len(above)] == above and not any(has(tree, keys[:name]) for tree in (self.own, self.base)):
                return pattern + keys[name:]
        return keys


@dataclass(frozen=True)
class Place:
    """A spot in a recipe; `place / key` is the spot below it."""

    origin: Origin
    keys: Keys = ()

    def __truediv__(self, key: Key) -> "Place":
        return Place(self.origin, (*self.keys, key))

    def error(self, message: str) -> RecipeError:
        """The message with this place at its end."""
        return RecipeError(f"{message} ({self.origin.where(self.keys)})")

    def unknown_key(self, got: Key, allowed: Iterable[Key]) -> RecipeError:
        """`unknown key 'topk'; did you mean 'top_k'? allowed: ...` at the key `got` below this place."""
        return (self / got).error(unknown("key", got, allowed))


def read_tree(path: Path | None, overrides: Iterable[str] = ()) -> tuple[dict, Origin]:
    """The file at `path` (None: nothing) over the one it extends, with `a.b.c=value` overrides set last."""
    own = {} if path is None else _read(path)
    path = path or Path("command line")
    base_path, base = _base_of(path, own)
    tree = merge(base or {}, {key: value for key, value in own.items() if key != "extends"})
    settings = [_split(text) for text in overrides]
    # what is given a kind is a part of its own and starts from nothing
    of_own_kind = {keys[:-1] for keys, _ in settings if keys[-1] == "kind"}
    # what starts as another value of the tree is set when that one is as it will be, whatever order they are given in
    for keys, value in sorted(settings, key=lambda setting: any(setting[0][: len(at)] == at for at in STARTS_AS)):
        _set(tree, keys, value, of_own_kind)
    return tree, Origin(path, own, base_path, base, tuple(keys for keys, _ in settings))


def _read(path: Path) -> dict:
    """A recipe as today's version says it, without its version.

    Raises: RecipeError.
    """
    try:
        tree = RUN.upgraded(read_yaml(path), path)
    except VersionError as error:
        raise RecipeError(str(error)) from error
    return {key: value for key, value in tree.items() if key != RUN.key}


def _base_of(path: Path, own: dict) -> tuple[Path | None, dict | None]:
    if "extends" not in own:
        return None, None
    if not isinstance(own["extends"], str):
        raise RecipeError(f"extends={own['extends']!r}: expected the path of one recipe ({path}: extends)")
    base_path = path.parent / own["extends"]
    try:
        base = _read(base_path)
    except RecipeError as error:
        raise RecipeError(f"{error}, extended by {path}") from error
    if "extends" in base:
        message = f"extends goes one level: {base_path} itself extends {base['extends']}"
        raise RecipeError(f"{message} ({path}: extends)")
    return base_path, base


def merge(base: Any, own: Any, key: Key | None = None) -> Any:
    """`own` over `base`: mappings key by key, everything else replaced, as are parts of another kind."""
    mappings = isinstance(base, dict) and isinstance(own, dict)
    if not mappings or key in ONE_OF or own.get("kind", base.get("kind")) != base.get("kind"):
        return copy_tree(own)
    merged = copy_tree(base)
    for name, value in own.items():
        merged[name] = merge(base[name], value, name) if name in base else copy_tree(value)
    return merged


def _split(text: str) -> tuple[Keys, Any]:
    name, equals, value = text.partition("=")
    names = name.strip().split(".")
    if not equals or not all(names):
        raise RecipeError(f"override {text!r} is not of the form key.key=value (command line)")
    keys = tuple(int(part) if part.isdecimal() else part for part in names)
    return keys, parse_yaml(value, f"command line: {name}")


def _set(tree: dict, keys: Keys, value: Any, of_own_kind: set[Keys]) -> None:
    node: Any = tree
    for depth, key in enumerate(keys[:-1]):
        _check_holds(node, keys, depth)
        if isinstance(node, dict) and node.get(key) is None:
            node[key] = {} if keys[: depth + 1] in of_own_kind else _start(tree, keys[:depth])
        node = node[key]
    _check_holds(node, keys, len(keys) - 1)
    if ONE_OF.intersection(keys[-2:-1]):
        node.clear()
    node[keys[-1]] = value


def _start(tree: dict, above: Keys) -> Any:
    """What a value that an override needs below `above` is before it is set in part."""
    pattern = STARTS_AS.get(above, ())
    return copy_tree(_at(tree, pattern)) if pattern and has(tree, pattern) else {}


def _at(tree: Any, keys: Keys) -> Any:
    for key in keys:
        tree = tree[key]
    return tree


def _check_holds(node: Any, keys: Keys, depth: int) -> None:
    """Raises: RecipeError where `keys[depth]` cannot be set in `node`."""
    key, above, dotted = keys[depth], ".".join(map(str, keys[:depth])), ".".join(map(str, keys))
    if isinstance(node, list) and not (isinstance(key, int) and key < len(node)):
        allowed = f"0 to {len(node) - 1}" if node else "none, the list is empty"
        raise RecipeError(f"list index {key!r} in {above}; allowed: {allowed} (command line: {dotted})")
    if not isinstance(node, dict | list):
        raise RecipeError(f"{above}={node!r} has no keys below it, so no {key!r} (command line: {dotted})")


def has(tree: Any, keys: Keys) -> bool:
    """Whether something stands at `keys` in a tree of mappings and lists."""
    for key in keys:
        below: dict = tree if isinstance(tree, dict) else dict(enumerate(tree)) if isinstance(tree, list) else {}
        if key not in below:
            return False
        tree = below[key]
    return True


def copy_tree(tree: Any) -> Any:
    """The same mappings and lists, none of them shared with `tree`."""
    if isinstance(tree, dict):
        return {key: copy_tree(value) for key, value in tree.items()}
    return [copy_tree(value) for value in tree] if isinstance(tree, list) else tree

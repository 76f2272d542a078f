"""One mutated command line, and what an answer to it must say."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Keys = tuple[Any, ...]


@dataclass(frozen=True)
class Case:
    """`words` is the command line. A refusal must hold one of `names` (the key, option or file at fault), one of
    `values` (what was given; empty where nothing was), and say what is allowed."""

    verb: str
    kind: str
    words: tuple[str, ...]
    names: tuple[str, ...]
    values: tuple[str, ...] = ()


class Draw(random.Random):
    """Random choices: what a mutation is made of."""

    def misspelled(self, word: str) -> str:
        """A word with a letter too many, too few, another one, or two swapped."""
        at = self.randrange(len(word))
        swapped = word[:at] + word[at + 1 : at + 2] + word[at] + word[at + 2 :]
        other = self.choice("abcdefghijklmnopqrstuvwxyz_")
        made = [word[:at] + other + word[at:], word[:at] + word[at + 1 :], word[:at] + other + word[at + 1 :], swapped]
        return self.choice([each for each in made if each and each != word])

    def of_another_type(self, value: Any) -> Any:
        """A plain value of another type."""
        others = [True, "word", [], [1, 2], {}, {"a": 1}, None, 3, -0.5, [[]], {"kind": "x"}]
        return self.choice([each for each in others if type(each) is not type(value)])


def leaves(tree: Any, keys: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """Every (path, value) below a tree of mappings and lists, inner ones included."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*keys, key), value
        yield from leaves(value, (*keys, key))


def chosen(draw: Draw, tree: Any, wanted: Callable[[Keys, Any], bool]) -> Keys:
    """The path of a random value for which `wanted(path, value)` holds."""
    return draw.choice([keys for keys, value in leaves(tree) if wanted(keys, value)])


def at(tree: Any, keys: Keys) -> Any:
    """The value at a path."""
    for key in keys:
        tree = tree[key]
    return tree


def forms(value: Any) -> tuple[str, ...]:
    """How a message may write a value."""
    if isinstance(value, dict):
        return (f"mapping of {len(value)}", str(value))
    if isinstance(value, list):
        return (f"list of {len(value)}", str(value), str(tuple(value)), f"got {len(value)}")
    shown = {str(value), repr(value), str(value).lower()}
    if isinstance(value, int | float) and not isinstance(value, bool):
        shown |= {f"{value:,}", f"{value:g}", f"{float(value)}"}
    return (*sorted(shown), *(["null", "none", "missing key", "not set"] if value is None else []))

"""Mutated recipes: for train, prepare, plan, compare and convert, as files and as key=value words."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from bench.reliability.cases import Case, Draw, Keys, at, chosen, forms
from moestro.recipe.parts import PARTS
from moestro.recipe.resolve import copy_tree
from moestro.recipe.syntax import dump_yaml

WRONG_VALUES = ("", "nan", "-1", "0", "1e999", "1e30", "[", "{kind: x}", "null", "'", "true", "&a 1", "!!int 3")
NO_FORM = ("=1", "..=1", ".", "=", " =", "a.=", "-", "x")


class Mutant(NamedTuple):
    """A mutated recipe as text (bytes where it is none), and what a refusal must name."""

    text: str | bytes
    names: tuple[str, ...]
    values: tuple[str, ...] = ()


def _named(keys: Keys) -> tuple[str, ...]:
    """The key itself, or for a number in a list the keys above it."""
    words = [str(key) for key in keys if isinstance(key, str)]
    # a key of `set` is itself a path
    return (words[-1], words[-1].rpartition(".")[2], ".".join(map(str, keys)))


def _changed(tree: dict, keys: Keys, value: Any) -> Mutant:
    tree = copy_tree(tree)
    at(tree, keys[:-1])[keys[-1]] = value
    return Mutant(dump_yaml(tree), _named(keys), forms(value))


def _is_key(keys: Keys, value: Any) -> bool:
    return isinstance(keys[-1], str)


def _is_number(keys: Keys, value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_word(keys: Keys, value: Any) -> bool:
    return isinstance(value, str) and "paper" not in keys


def misspelled_key(draw: Draw, tree: dict) -> Mutant:
    # arms may have any name
    keys = chosen(draw, tree, lambda keys, value: _is_key(keys, value) and keys[:-1] != ("arms",))
    tree = copy_tree(tree)
    node, wrong = at(tree, keys[:-1]), draw.misspelled(keys[-1])
    node[wrong] = node.pop(keys[-1])
    return Mutant(dump_yaml(tree), (wrong, keys[-1]))


def missing_key(draw: Draw, tree: dict) -> Mutant:
    keys, tree = chosen(draw, tree, _is_key), copy_tree(tree)
    del at(tree, keys[:-1])[keys[-1]]
    # where a default takes its place, what it does not go with is named
    return Mutant(dump_yaml(tree), (*_named(keys), "=", "key", *map(str, keys)))


def extra_key(draw: Draw, tree: dict) -> Mutant:
    keys = chosen(draw, tree, lambda keys, value: isinstance(value, dict))
    name = draw.choice(["size", "n_expert", "Width", "kinds", "__class__", "self", "x y", "1st", "ключ", ""])
    return _changed(tree, (*keys, name), draw.choice([1, "x", None, []]))._replace(values=())


def wrong_type(draw: Draw, tree: dict) -> Mutant:
    keys = chosen(draw, tree, lambda keys, value: True)
    return _changed(tree, keys, draw.of_another_type(at(tree, keys)))


def empty_value(draw: Draw, tree: dict) -> Mutant:
    return _changed(tree, chosen(draw, tree, _is_key), None)


def huge_number(draw: Draw, tree: dict) -> Mutant:
    mutant = _changed(tree, chosen(draw, tree, _is_number), 10 ** draw.randint(6, 40))
    # of a model that is larger than memory the parts are named, not which number made it so
    return mutant._replace(names=(*mutant.names, "too large", "training needs about"))


def negative_number(draw: Draw, tree: dict) -> Mutant:
    keys = chosen(draw, tree, _is_number)
    return _changed(tree, keys, -draw.choice([1, abs(at(tree, keys)) or 1, 10**9]))


def zero(draw: Draw, tree: dict) -> Mutant:
    keys = chosen(draw, tree, _is_number)
    return _changed(tree, keys, type(at(tree, keys))(0))


def not_finite(draw: Draw, tree: dict) -> Mutant:
    keys, word = chosen(draw, tree, _is_number), draw.choice(["nan", ".nan", "inf", "-.inf", "1e999", "-1e400"])
    text = _changed(tree, keys, "@@").text.replace("'@@'", word)
    return Mutant(text, _named(keys), (word, "nan", "inf"))


def number_as_word(draw: Draw, tree: dict) -> Mutant:
    keys, word = chosen(draw, tree, _is_number), draw.choice(["1,000", "0x10", "1 000", "ten", "1_", "1e", "²", "١٢"])
    return _changed(tree, keys, word)


def wrong_choice(draw: Draw, tree: dict) -> Mutant:
    keys = chosen(draw, tree, _is_word)
    return _changed(tree, keys, draw.choice([draw.misspelled(at(tree, keys) or "x"), "no-such-thing", " ", "Ａ"]))


def other_part(draw: Draw, tree: dict) -> Mutant:
    """A part of another kind, without anything it needs or with what the old one had."""
    keys, tree = chosen(draw, tree, lambda keys, value: keys[-1] == "kind"), copy_tree(tree)
    kind = draw.choice(sorted({kind for kinds in PARTS.values() for kind in kinds}))
    node = at(tree, keys[:-1])
    if draw.random() < 0.5:
        node.clear()
    node["kind"] = kind
    return Mutant(dump_yaml(tree), (kind, *_named(keys[:-1]), "kind", "key"))


def twice(draw: Draw, tree: dict) -> Mutant:
    key = draw.choice(sorted(tree))
    return Mutant(f"{dump_yaml(tree)}\n{key}: 1\n", (key,), ("line",))


def broken_text(draw: Draw, tree: dict) -> Mutant:
    text = dump_yaml(tree)
    spot = draw.randrange(len(text))
    inserted = draw.choice(
        ["\t", "\t- x", "{", "[", "'", '"', "\n- a\n", ": :", "%", "@", "\x00", "\x07", "\ufeff", "&", "*"]
    )
    return Mutant(text[:spot] + inserted + text[spot:], ("line", "unknown", "expected", "missing", "key", "=", "file"))


def cut_text(draw: Draw, tree: dict) -> Mutant:
    text = dump_yaml(tree)
    return Mutant(text[: draw.randrange(len(text))], ("line", "missing key", "expected", "unknown", "mapping"))


def binary(draw: Draw, tree: dict) -> Mutant:
    made = [
        draw.randbytes(200),
        b"",
        b"\n\n",
        b"\xff\xfe" + dump_yaml(tree).encode("utf-16-le"),
        b"\x7fELF",
        b"PK\x03\x04",
    ]
    return Mutant(draw.choice([*made, dump_yaml(tree).encode() + b"\xe9"]), ("recipe", "YAML", "line"))


def deep(draw: Draw, tree: dict) -> Mutant:
    """Thousands of levels."""
    key, n = draw.choice(sorted(tree)), draw.choice([200, 5000, 100_000])
    inner = draw.choice(["[" * n + "]" * n, "{a: " * n + "1" + "}" * n, "- " * n + "1"])
    rest = {name: value for name, value in tree.items() if name != key}
    return Mutant(f"{dump_yaml(rest)}{key}: {inner}\n", (key, "line"))


def anchors(draw: Draw, tree: dict) -> Mutant:
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    tags = ["!!python/object/apply:os.system ['true']", "!!python/name:os.system", "!include /etc/passwd", "!x {}"]
    made = [bomb, "x: &a {b: *a}\n", "<<: *x\n", *(f"x: {tag}\n" for tag in tags)]
    return Mutant(dump_yaml(tree) + draw.choice(made), ("anchors", "tags"), ("line",))


def many_digits(draw: Draw, tree: dict) -> Mutant:
    keys = chosen(draw, tree, _is_number)
    text = _changed(tree, keys, "@@").text.replace("'@@'", "9" * draw.choice([400, 5000, 100_000]))
    return Mutant(text, (*_named(keys), "line"))


def extension(draw: Draw, tree: dict) -> Mutant:
    value = draw.choice(["nowhere.yaml", ".", "text.txt", "", [], 3, None, "\x00", "x" * 5000, "recipe.yaml"])
    return Mutant(dump_yaml({"extends": value, **tree}), ("extends", "recipe"), (*forms(value), "/"))


def wrong_path(draw: Draw, tree: dict) -> Mutant:
    path = draw.choice(
        ["nowhere.txt", "", ".", "*.nothing", "a\x00b", "x" * 5000, "../stock/config.json", "[", "../stock"]
    )
    source = {"kind": draw.choice(["text", "jsonl", "parquet"]), "paths": draw.choice([path, [path], []])}
    tree = copy_tree(tree)
    tree.setdefault("data", {})["source"] = source
    return Mutant(dump_yaml(tree), ("paths", "source", "data"))


RECIPE_MUTATIONS: tuple[Callable[[Draw, dict], Mutant], ...] = (
    misspelled_key, missing_key, extra_key, wrong_type, empty_value, huge_number, negative_number, zero, not_finite,
    number_as_word, wrong_choice, other_part, twice, broken_text, cut_text, binary, deep, anchors, many_digits,
    extension, wrong_path,
)  # fmt: skip


def recipe_case(draw: Draw, verb: str, base: tuple[str, ...], tree: dict, file: Path) -> Case:
    """A mutated recipe in `file`; `base` is the command line in which RECIPE stands for it."""
    mutate = draw.choice(RECIPE_MUTATIONS)
    mutant = mutate(draw, tree)
    text = mutant.text
    file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    words = tuple(str(file) if word == "RECIPE" else word for word in base)
    return Case(verb, mutate.__name__.replace("_", " "), words, mutant.names, mutant.values)


def override_case(draw: Draw, verb: str, base: tuple[str, ...], tree: dict, file: Path) -> Case:
    """A recipe in `file` that is right, and a `key=value` that is not."""
    keys = chosen(draw, tree, lambda keys, value: "paper" not in keys)
    dotted, last = ".".join(map(str, keys)), str(keys[-1])
    wrong = draw.choice(WRONG_VALUES)
    made = {
        "no value": (f"{dotted}={wrong}", (last, dotted), (wrong, "line", "null", "got")),
        "no key": (f"{draw.misspelled(dotted)}={at(tree, keys)}", (last, "key", "index", "kind"), ()),
        "no form": (draw.choice([*NO_FORM, dotted, f"{dotted}:1"]), ("key=value", "unexpected", "option"), ()),
        "below a value": (f"{dotted}.x.y=1", (last, "x"), ()),
        "too far": (f"{dotted}.{10**12}=1", (last, str(10**12)), ()),
        "strange letters": (f"{dotted}=\udcff\u202e\U0001f600", (last, "override", "line"), ()),
    }
    kind = draw.choice(sorted(made))
    word, names, values = made[kind]
    file.write_text(dump_yaml(tree))
    words = tuple(str(file) if each == "RECIPE" else each for each in base)
    return Case(verb, f"override, {kind}", (*words, word), names, values)

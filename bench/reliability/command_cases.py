"""Mutated command lines: options, values and paths of every verb, read off the verbs' own parsers."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench.reliability.cases import Case, Draw
from moestro.cli import VERBS
from moestro.cli.arguments import Parser

Words = tuple[str, ...]
NUMBERS = (
    "0",
    "-1",
    "nan",
    "inf",
    "1e3",
    "1.5",
    "x",
    "",
    " ",
    "٣",
    "1_000",
    "9" * 30,
    "9" * 5000,
    "0x10",
    "1e400",
    "²",
)
# all of them in the folder in which mutated commands run
PATHS = ("nowhere/x", "", ".", "../text.txt", "../stock", "../stock/config.json", "x" * 5000, "a\x00b", "\udcff", " ")
TEXTS = ("", "x", "\x00", "\udcff", "{kind: x}", "[", "a" * 20_000, "=", ",", "😀", "-", "{kind: text, paths: nowhere}")


def parser_of(verb: str) -> Parser:
    """The verb's parser, as the command line makes it."""
    parser = Parser(f"moestro {verb}")
    VERBS[verb].add_arguments(parser)
    return parser


def options_of(verb: str) -> list[argparse.Action]:
    """Its options, --help aside."""
    return [each for each in parser_of(verb)._actions if each.option_strings and each.dest != "help"]


def _takes_value(action: argparse.Action) -> bool:
    return action.nargs != 0


def _wrong(draw: Draw, action: argparse.Action) -> str:
    """A value that an option may not like."""
    if action.choices:
        choices = [str(choice) for choice in action.choices]
        return draw.choice([draw.misspelled(draw.choice(choices)), "", "nothing", " "])
    if action.type is Path:
        return draw.choice(PATHS)
    return draw.choice(TEXTS if action.type in (None, str) else NUMBERS)


def wrong_value(draw: Draw, verb: str, base: Words) -> Case:
    takers = [each for each in options_of(verb) if _takes_value(each)]
    if not takers:
        return misspelled_option(draw, verb, base)
    action = draw.choice(takers)
    option, value = action.option_strings[0], _wrong(draw, action)
    key = option.lstrip("-")
    # of a path the path itself may be named in place of the option
    path = (value.rpartition("/")[2][:30] or "folder",) if action.type is Path else ()
    names = (key, key.replace("-", "_"), option, str(action.metavar), action.dest, *key.split("-"), *path)
    return Case(
        verb, "wrong value", (*_without(base, option), f"{option}={value}"), names, (value[:30], repr(value)[:30])
    )


def without_value(draw: Draw, verb: str, base: Words) -> Case:
    takers = [each.option_strings[0] for each in options_of(verb) if _takes_value(each)]
    if not takers:
        return misspelled_option(draw, verb, base)
    option = draw.choice(takers)
    return Case(verb, "option without value", (*_without(base, option), option), (option,))


def misspelled_option(draw: Draw, verb: str, base: Words) -> Case:
    options = ["--traceback", *(each.option_strings[0] for each in options_of(verb))]
    wrong = "--" + draw.misspelled(draw.choice(options)[2:])
    words = (f"{wrong}=1",) if draw.random() < 0.5 else (wrong,)
    return Case(verb, "misspelled option", (*base, *words), (wrong, "--"))


def value_for_switch(draw: Draw, verb: str, base: Words) -> Case:
    switches = [each for each in options_of(verb) if not _takes_value(each)]
    if not switches:
        return misspelled_option(draw, verb, base)
    option = draw.choice(switches).option_strings[0]
    return Case(verb, "value for a switch", (*base, f"{option}=yes"), (option,), ("yes",))


def extra_word(draw: Draw, verb: str, base: Words) -> Case:
    word = draw.choice(["extra", "", "--", "---", "-x", "😀", "\x00", "a b", "help", "-1"])
    return Case(verb, "extra word", (*base, word), (word, repr(word), "key=value", "takes one", "unexpected"))


def missing_word(draw: Draw, verb: str, base: Words) -> Case:
    at = draw.randrange(len(base))
    gone = base[at]
    return Case(
        verb,
        "missing word",
        base[:at] + base[at + 1 :],
        ("required", "argument", "say", "unexpected", gone, "need", "key=value", "takes one", "give"),
    )


def wrong_path(draw: Draw, verb: str, base: Words) -> Case:
    """One of the paths replaced by one that names nothing or something else."""
    there = [number for number, word in enumerate(base) if "/" in word and "=" not in word]
    if not there:
        return extra_word(draw, verb, base)
    number, path = draw.choice(there), draw.choice(PATHS)
    words = (*base[:number], path, *base[number + 1 :])
    return Case(
        verb,
        "wrong path",
        words,
        (path[:30], repr(path)[:30], "null byte", "path", "folder", "file", "name", path.rpartition("/")[2][:30]),
    )


def repeated(draw: Draw, verb: str, base: Words) -> Case:
    return Case(verb, "words twice", (*base, *base), ("unexpected", "takes one", "key=value", "empty", "required"))


def together(draw: Draw, verb: str, base: Words) -> Case:
    """Several options at once, each with a plausible value."""
    words: list[str] = []
    for action in draw.sample(options_of(verb), min(3, len(options_of(verb)))):
        value = (
            draw.choice([str(each) for each in action.choices]) if action.choices else PLAUSIBLE.get(action.type, "1")
        )
        words += [action.option_strings[0], *([value] if _takes_value(action) else [])]
    return Case(verb, "options together", (*base, *words), ())


PLAUSIBLE: Mapping[Any, str] = {Path: "nowhere", float: "0.5", int: "1", None: "a"}
COMMAND_MUTATIONS: tuple[Callable[[Draw, str, Words], Case], ...] = (
    wrong_value, wrong_value, wrong_value, without_value, misspelled_option, value_for_switch, extra_word, missing_word,
    wrong_path, wrong_path, repeated, together,
)  # fmt: skip


def _without(base: Words, option: str) -> Words:
    """The command line without an option that takes a value."""
    if option not in base:
        return base
    at = base.index(option)
    return base[:at] + base[at + 2 :]


def command_case(draw: Draw, verb: str, base: Words) -> Case:
    """A mutated command line of a verb; `base` is one that works."""
    return draw.choice(COMMAND_MUTATIONS)(draw, verb, base)

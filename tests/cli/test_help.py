"""Help that can be followed: every verb in the overview, every example understood, every default said."""

import argparse
import re
import shlex

import pytest

from moestro.cli import VERBS, main
from moestro.cli.dispatch import GROUPS, parser_of, summary
from tests.conftest import ROOT

# Words of this repository that a user of the command line has no reason to know.
INTERNAL = re.compile(r"\b(knobs?|shards?|traces? of|floor|binder|bank|branch(es)?|argument group)\b", re.IGNORECASE)


def help_of(verb: str) -> str:
    return parser_of(verb).format_help()


def examples(verb: str) -> list[list[str]]:
    _, _, lines = (VERBS[verb].run.__doc__ or "").partition("examples:\n")
    return [shlex.split(line, comments=True) for line in lines.splitlines() if line.strip()]


def test_the_overview_has_every_verb_once(capsys):
    grouped = [name for names in GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(VERBS)
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(any(line.startswith(f"  {name} ") and summary(name) in line for line in lines) for name in VERBS)
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("verb", VERBS)
def test_a_summary_is_a_sentence_for_users(verb):
    assert summary(verb).endswith(".") and summary(verb)[0].isupper() and not INTERNAL.search(summary(verb))


@pytest.mark.parametrize("verb", VERBS)
def test_examples_are_understood_and_name_recipes_that_exist(verb):
    found = examples(verb)
    assert found
    for words in found:
        if words[0] != "moestro":
            # in a pipe or an eval
            inner = re.search(r"moestro (.*?)(\)|$)", " ".join(words))
            assert inner, words
            words = ["moestro", *shlex.split(inner[1])]
        assert words[1] == verb
        _, rest = parser_of(verb).parse_known_intermixed_args(words[2:])
        assert not rest, words
        recipes = [word for word in words if word.startswith("recipes/")]
        assert all((ROOT / recipe).is_file() for recipe in recipes), words


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_says_what_it_does(verb):
    for action in parser_of(verb)._actions:
        text = action.help or ""
        assert len(text.split()) > 1, action.option_strings
        assert not re.match(r"(default|of) ?:", text), f"{action.option_strings} says its default only"
        assert not INTERNAL.search(text), (action.option_strings, text)


@pytest.mark.parametrize("verb", VERBS)
def test_defaults_that_are_not_nothing_are_said(verb):
    for action in parser_of(verb)._actions:
        silent = action.default in (None, False, argparse.SUPPRESS, []) or action.default == ""
        assert silent or "default" in (action.help or ""), action.option_strings


def test_help_is_wrapped_and_examples_are_not(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    text = help_of("offload")
    assert "  moestro offload profile routing.jsonl --memory 4GiB\n" in text
    before, _, _ = text.partition("examples:")
    assert max(map(len, before.splitlines())) <= 60

"""The README says what is true: its Python runs, its commands name files and keys that exist."""

import re
import shlex
from pathlib import Path

import pytest

from moestro.cli.dispatch import VERBS
from moestro.compare.plan import load_comparison
from moestro.convert.plan import load_conversion
from moestro.recipe.load import load_recipe

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, flags=re.DOTALL)
COMMANDS = [
    shlex.split(line, comments=True)
    for language, block in BLOCKS
    if language == "sh"
    for line in block.splitlines()
    if line.startswith(("moestro ", "make "))
]


@pytest.mark.parametrize("block", [block for language, block in BLOCKS if language == "python"])
def test_python_blocks_run(block):
    exec(compile(block, "README.md", "exec"), {})


def test_there_are_commands_to_check():
    assert {command[0] for command in COMMANDS} == {"make", "moestro"}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands_name_things_that_exist(command):
    program, verb, *rest = command
    if program == "make":
        assert re.search(rf"^{verb}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    elif verb == "train":
        load_recipe(ROOT / rest[0], rest[1:])
    elif verb == "compare":
        load_comparison(ROOT / rest[0])
    elif verb == "convert":
        load_conversion(ROOT / rest[rest.index("--recipe") + 1])
    else:
        assert verb in VERBS


def test_files_and_folders_that_are_named_exist():
    named = re.findall(r"`((?:moestro|recipes|tests|docs)/[\w./-]+)`|\]\(([\w./-]+)\)", TEXT)
    paths = {first or second for first, second in named}
    assert len(paths) > 10
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_it_is_short():
    assert len(TEXT.splitlines()) <= 150

"""The README says what is true: its Python runs, its commands name files and keys that exist."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from moestro.cli import VERBS
from moestro.cli.arguments import Parser
from moestro.compare.plan import load_comparison
from moestro.convert.plan import load_conversion
from moestro.recipe.load import load_recipe
from tests.blocks import Block, Reader

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, flags=re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """The words of the commands in a page's shell blocks."""
    blocks = [block for language, block in re.findall(r"```(\w+)\n(.*?)```", text, flags=re.DOTALL) if language == "sh"]
    lines = [line for block in blocks for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith(("moestro ", "make "))]


COMMANDS = commands(TEXT)
OF_PAGES = [words for name in ("evaluate", "serve") for words in commands((ROOT / "docs" / f"{name}.md").read_text())]


@pytest.mark.parametrize("block", [block for language, block in BLOCKS if language == "python"])
def test_python_blocks_run(block):
    exec(compile(block, "README.md", "exec"), {})


# The README says that a look needs 20 steps; here it is fewer, over a text that is tokenized at once.
SCALED = {"train": ["train.budget.steps=3", "train.eval_tokens=1024"]}
READ_ONLY = {
    "make demo": "takes minutes and an environment of its own: bench/reliability/newcomer.py does it",
    "make test": "is this",
    "moestro compare recipes/compare/first_look.yaml": "what make demo does; tests/compare runs small ones",
    "moestro eval runs/hmoe-0 --tasks papers --data path/to/data": "needs the data; tests/harness has rows of each",
    "moestro serve exported/hmoe": "runs until it is stopped: tests/test_tour.py does so",
}


def line_of(command: list[str]) -> str:
    return " ".join(command)


def test_what_is_only_read_stands_there():
    assert set(READ_ONLY) <= set(map(line_of, COMMANDS))
    assert {language for language, _ in BLOCKS} == {"sh", "python"}


@pytest.mark.slow
def test_every_other_command_runs_in_order(tmp_path, small_data):
    pytest.importorskip("compressed_tensors")
    reader = Reader(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    for command in COMMANDS:
        if line_of(command) not in READ_ONLY:
            words = [*command, *SCALED.get(command[1], []), *(small_data if command[1] == "train" else [])]
            reader.follow(Block("sh", "", shlex.join(words)))
    made = ("runs/hmoe-0/inspect.html", "runs/dense-1/done.json", "runs/narrow/recipe.yaml", "runs/moe/recipe.yaml")
    assert [path for path in (*made, "exported/hmoe/config.json") if not (tmp_path / path).is_file()] == []


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash on this machine")
def test_completion_is_switched_on_as_it_says(tmp_path):
    (line,) = re.findall(r"`(eval \"\$\(moestro completion bash\)\")`", TEXT)
    assert "_moestro" in Reader(tmp_path).follow(Block("sh", "", f"{line}; complete -p moestro"))


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
        understood(verb, rest)


def understood(verb: str, words: list[str]) -> None:
    parser = Parser()
    VERBS[verb].add_arguments(parser)
    parser.parse_intermixed_args(words)


@pytest.mark.parametrize("command", OF_PAGES, ids=" ".join)
def test_commands_of_the_pages_are_understood(command):
    words = command[: command.index("<")] if "<" in command else command
    understood(words[1], words[2:])


def test_files_and_folders_that_are_named_exist():
    named = re.findall(r"`((?:moestro|recipes|tests|docs)/[\w./-]+)`|\]\(([\w./-]+)\)", TEXT)
    paths = {first or second for first, second in named}
    assert len(paths) > 10
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_it_is_short():
    assert len(TEXT.splitlines()) <= 150

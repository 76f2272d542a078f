"""From the words of a command to its verb, and from errors to messages and exit codes."""

import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import Protocol

from moestro.cli import (
    compare,
    completion,
    compress,
    convert,
    evaluate,
    export,
    generate,
    import_model,
    inspect,
    offload,
    plan,
    prepare,
    serve,
    train,
    version,
)
from moestro.cli.arguments import Parser, UsageError
from moestro.cli.terminal import failed
from moestro.recipe.syntax import RecipeError, unknown

# What can go wrong without a mistake in this package; anything else keeps its traceback.
FAILURES = (RuntimeError, ValueError, OSError, ImportError, ArithmeticError, MemoryError)
# What the system says of a file, and what is needed there.
OF_FILES: dict[type[OSError], str] = {
    FileNotFoundError: "no such file or folder",
    IsADirectoryError: "is a folder, a file is needed",
    NotADirectoryError: "lies below a file, a folder is needed",
    FileExistsError: "exists, choose another name",
    PermissionError: "may not be read or written by this user",
}


class Verb(Protocol):
    """A module of this package; the docstring of `run` is the verb's help: a line, then more where needed, and last a
    paragraph `examples:` of commands."""

    def add_arguments(self, parser: Parser) -> None: ...

    def run(self, arguments: Namespace) -> int: ...


VERBS: dict[str, Verb] = {
    "train": train,
    "compare": compare,
    "prepare": prepare,
    "plan": plan,
    "eval": evaluate,
    "inspect": inspect,
    "generate": generate,
    "serve": serve,
    "offload": offload,
    "import": import_model,
    "export": export,
    "convert": convert,
    "compress": compress,
    "completion": completion,
    "version": version,
}
GROUPS: dict[str, tuple[str, ...]] = {
    "train": ("train", "compare", "prepare", "plan"),
    "look": ("eval", "inspect"),
    "run": ("generate", "serve", "offload"),
    "change": ("import", "export", "convert", "compress"),
    "other": ("completion", "version"),
}
END = """\
start with:
  moestro train recipes/hmoe.yaml                                  a run folder, runs/hmoe-0
  moestro train recipes/hmoe.yaml optim.lr=1e-3 --out runs/slower  any key of a recipe can be set
  moestro inspect runs/hmoe-0                                      what its experts did

exit codes: 0 done (or stopped by a signal, and saved), 1 failed while running, 2 a mistake in the command or recipe,
130 interrupted"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(words)
    except UsageError as error:
        return failed(f"{error}", 2)
    except KeyboardInterrupt:
        return failed("interrupted", 130)
    except FAILURES as error:
        if "--traceback" in words:
            raise
        return failed(_told(error), 2 if isinstance(error, RecipeError) else 1)


def _told(error: Exception) -> str:
    """What an error says; where it is none of this package's own, how to learn more."""
    message = str(error).strip() or type(error).__name__
    if isinstance(error, OSError) and error.filename is not None:
        return f"{str(error.filename)!r}: {OF_FILES.get(type(error), error.strerror)}"
    own = type(error).__module__.split(".")[0] == "moestro"
    return message if own else f"{message} ({type(error).__name__}; add --traceback to see where)"


def _dispatch(words: list[str]) -> int:
    for word in words:
        if any("\ud800" <= letter <= "\udfff" for letter in word):
            raise UsageError(f"{word!r} is not valid UTF-8: give words, names and paths in UTF-8")
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0 if words else 2
    name = "version" if words[0] == "--version" else words[0]
    if name not in VERBS:
        raise UsageError(unknown("option" if name.startswith("-") else "verb", name, [*VERBS, "--help", "--version"]))
    verb = VERBS[name]
    parser = parser_of(name)
    arguments, rest = parser.parse_known_intermixed_args(words[1:])
    if rest:
        raise UsageError(f"{_left_over(parser, rest[0])} (moestro {name})")
    return verb.run(arguments)


def parser_of(name: str) -> Parser:
    """What reads the words of a verb, and explains it."""
    verb = VERBS[name]
    parser = Parser(f"moestro {name}", verb.run.__doc__)
    verb.add_arguments(parser)
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error arose")
    return parser


def _left_over(parser: Parser, word: str) -> str:
    options = [name for action in parser._actions for name in action.option_strings]
    if not word.startswith("-"):
        meant = f"; did you mean --set {word}?" if "=" in word and "--set" in options else ""
        return f"unexpected {word!r}{meant}"
    return unknown("option", word.split("=")[0], options)


def summary(name: str) -> str:
    """What a verb does, in one line."""
    return (VERBS[name].run.__doc__ or "").splitlines()[0]


def _overview() -> str:
    lines = ["usage: moestro VERB ...   (moestro VERB --help explains one, with examples)"]
    for title, names in GROUPS.items():
        lines += ["", f"{title}:", *(f"  {name:<11}{summary(name)}" for name in names)]
    return "\n".join([*lines, "", END])

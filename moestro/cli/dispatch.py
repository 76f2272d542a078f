"""From the words of a command to its verb, and from errors to messages and exit codes."""

import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import Protocol

from moestro.cli import (
    compare,
    compress,
    convert,
    evaluate,
    export,
    generate,
    import_model,
    inspect,
    offload,
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


class Verb(Protocol):
    """A module of this package; the docstring of `run` explains the verb."""

    def add_arguments(self, parser: Parser) -> None: ...

    def run(self, arguments: Namespace) -> int: ...


VERBS: dict[str, Verb] = {
    "train": train,
    "eval": evaluate,
    "inspect": inspect,
    "generate": generate,
    "serve": serve,
    "compare": compare,
    "compress": compress,
    "convert": convert,
    "export": export,
    "import": import_model,
    "offload": offload,
    "prepare": prepare,
    "version": version,
}


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
    """What an error says, in one line; where it is none of this package's own, how to learn more."""
    message = " ".join(str(error).split()) or type(error).__name__
    own = type(error).__module__.split(".")[0] == "moestro"
    return message if own else f"{message} ({type(error).__name__}; add --traceback to see where)"


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0 if words else 2
    name = "version" if words[0] == "--version" else words[0]
    if name not in VERBS:
        raise UsageError(unknown("option" if name.startswith("-") else "verb", name, [*VERBS, "--help", "--version"]))
    verb = VERBS[name]
    parser = Parser(prog=f"moestro {name}", description=verb.run.__doc__, allow_abbrev=False)
    verb.add_arguments(parser)
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error arose")
    arguments, rest = parser.parse_known_intermixed_args(words[1:])
    if rest:
        raise UsageError(f"{_left_over(parser, rest[0])} (moestro {name})")
    return verb.run(arguments)


def _left_over(parser: Parser, word: str) -> str:
    if not word.startswith("-"):
        return f"unexpected {word!r}"
    options = [name for action in parser._actions for name in action.option_strings]
    return unknown("option", word.split("=")[0], options)


def _overview() -> str:
    lines = [f"  {name:<9} {(verb.run.__doc__ or '').splitlines()[0]}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "usage: moestro VERB ...   (moestro VERB --help explains one)",
            "",
            *lines,
            "",
            "Values of a recipe can be set on the command line: moestro train recipes/hmoe.yaml optim.lr=1e-3",
        ]
    )

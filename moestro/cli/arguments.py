"""Arguments that several verbs take, and the parser that reads them."""

import argparse
import inspect
import os
import re
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from moestro.cli.values import file_path, number, positive, whole
from moestro.recipe.syntax import nearest

if TYPE_CHECKING:
    from moestro.export import Opened
    from moestro.recipe.evaluation import Run

CHECKPOINT = "which of a run's checkpoints: the newest (default), or the best on held-out text"
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class UsageError(Exception):
    """A command that cannot be understood."""


class Help(argparse.HelpFormatter):
    """Wraps paragraphs, and leaves what is indented in them as it stands."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = inspect.cleandoc(text).split("\n\n")
        wrapped = (each if "\n " in each else textwrap.fill(" ".join(each.split()), width) for each in paragraphs)
        return "\n\n".join(wrapped)


class Parser(argparse.ArgumentParser):
    """Of one verb; `description` is the docstring of its `run`. Raises `UsageError` in place of printing its usage and
    exiting; checks numbers and paths as it reads them."""

    def __init__(self, prog: str = "moestro", description: str | None = None) -> None:
        # 3.14 colours help by default
        super().__init__(prog, description=description, formatter_class=Help, allow_abbrev=False)
        for kind, read in ((int, whole), (float, number), (Path, file_path)):
            self.register("type", kind, read)

    def error(self, message: str) -> NoReturn:
        # Python 3.11 counts what may be given any number of times, none included, as required
        message = message.replace(", key=value", "").replace("ignored explicit argument", "takes no value, got")
        raise UsageError(f"{message} ({self.prog} --help)")


def add_recipe(parser: Parser, where: str = "recipes/", keys: str = "optim.lr=1e-3 train.seed=1") -> None:
    """RECIPE and key=value ...; `where` some lie, and `keys` that they have."""
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help=f"a YAML file, such as those in {where}")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"set any key of the recipe: {keys}")


def add_device(parser: Parser) -> None:
    """--device"""
    parser.add_argument("--device", help="cpu, cuda, cuda:N or mps (default: cuda where there is one, else cpu)")


def add_model(parser: Parser) -> None:
    """MODEL, --set, --checkpoint, --dtype, --device"""
    parser.add_argument(
        "model", type=Path, metavar="MODEL", help="a run folder, or a model's folder in Hugging Face's format"
    )
    add_settings(parser, "continue texts")
    add_checkpoint(parser)
    add_dtype(parser)
    add_device(parser)


def add_checkpoint(parser: Parser) -> None:
    """--checkpoint"""
    parser.add_argument("--checkpoint", choices=("newest", "best"), default="newest", help=CHECKPOINT)


def add_dtype(parser: "argparse._ActionsContainer") -> None:
    """--dtype"""
    parser.add_argument("--dtype", choices=DTYPES, help="type of the weights (default: as they are stored)")


def refuse(arguments: argparse.Namespace, unset: Mapping[str, Any], why: str) -> None:
    """Raises: UsageError where the command gives one of these options, whose values where it gives none are `unset`;
    `{}` in `why` is the option with its value, of several the first."""
    for name, default in unset.items():
        if (given := getattr(arguments, name)) != default:
            option = "--set" if name == "settings" else f"--{name.replace('_', '-')}"
            first = given[0] if isinstance(given, list) else given
            raise UsageError(why.format(option if given is True else f"{option}={first}"))


def opened_model(arguments: argparse.Namespace, model: Path) -> "Opened":
    """The model that the arguments of `add_model` name, and its tokenizer.

    Raises: UsageError for a device that is not there; ImportError; what `open_model` raises.
    """
    import torch

    device = device_named(arguments.device)
    if not model.is_dir():
        raise UsageError(f"{model}: no such folder")
    # read when transformers is imported: a folder is open in a moment
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with extra("hf"):
        from moestro.export import open_model
    dtype = None if arguments.dtype is None else getattr(torch, DTYPES[arguments.dtype])
    return open_model(model, device, dtype, arguments.checkpoint, settings=arguments.settings)


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Around the imports of a verb that needs the extra `name`.

    Raises: ImportError that says how to install it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "moestro":
            raise
        raise ImportError(f"this needs the package {error.name!r}: pip install 'moestro[{name}]'") from error


def add_run(parser: Parser, tokens: str) -> None:
    """RUN, and on which text and how it is measured; `tokens` says how many are read where --tokens is not given."""
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder, as moestro train writes it")
    parser.add_argument(
        "--data",
        metavar="PATH|SOURCE",
        help="text to measure on: a file, a folder, or a source as in recipes (default: the run's held-out text)",
    )
    parser.add_argument("--tokens", type=positive, metavar="N", help=f"use about so many (default: {tokens})")
    add_settings(parser, "measure")
    add_checkpoint(parser)
    add_json(parser)
    add_device(parser)


def add_settings(parser: Parser, do: str) -> None:
    """--set; `do` is what is done so"""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="settings",
        metavar="key=value",
        help=f"{do} with another threshold or top_k than the run was trained with, such as "
        "model.ffn.router.select.top_k=1; may be repeated",
    )


def add_json(parser: Parser) -> None:
    """--json"""
    parser.add_argument(
        "--json",
        type=Path,
        nargs="?",
        const=Path("-"),
        metavar="PATH",
        help="write JSON, to PATH or else to the terminal",
    )


def run_of(arguments: argparse.Namespace) -> "Run":
    """The run and the text that the arguments of `add_run` name.

    Raises: UsageError for a device that is not there; what `opened_run` raises.
    """
    from moestro.recipe.evaluation import opened_run

    device = device_named(arguments.device)
    return opened_run(arguments.run, arguments.data, device, arguments.checkpoint, arguments.settings)


def device_named(name: str | None) -> str:
    """The device to use: the one asked for, or CUDA where there is one, else the CPU.

    Raises: UsageError where this machine has none such.
    """
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if kind not in there or (index and not index.isdecimal()):
        raise UsageError(f"device {name!r}{nearest(kind, there) or ';'} allowed: cpu, cuda, cuda:N, mps")
    if int(index or 0) >= there[kind]:
        raise UsageError(f"device {name!r}: this machine has {there[kind]} of kind {kind}")
    return name


def size(text: str) -> int:
    """Bytes: 8GiB, 500MB, 1.5g, 4096.

    Raises: argparse.ArgumentTypeError.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", text.lower(), re.ASCII)
    if found is None or not float(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; allowed: 8GiB, 500MB, 4096 and such")
    if (value := float(found[1]) * UNITS[found[2] or ""]) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is more than any memory has; allowed: 8GiB, 500MB, 4096 and such")
    return int(value)

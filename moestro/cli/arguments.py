"""Arguments that several verbs take, and the parser that reads them."""

import argparse
from pathlib import Path
from typing import NoReturn

from moestro.recipe.syntax import nearest


class UsageError(Exception):
    """A command that cannot be understood."""


class Parser(argparse.ArgumentParser):
    """Raises `UsageError` in place of printing its usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def add_recipe(parser: Parser) -> None:
    """RECIPE and key=value ..."""
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="a value to set: optim.lr=1e-3")


def add_device(parser: Parser) -> None:
    """--device"""
    parser.add_argument("--device", help="cpu, cuda, cuda:N or mps (default: cuda where there is one, else cpu)")


def add_run(parser: Parser, tokens: str) -> None:
    """RUN, and on which text and how it is measured; `tokens` says how many are read where --tokens is not given."""
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--data", metavar="PATH|SOURCE", help="text to look at (default: the run's held-out text)")
    parser.add_argument("--tokens", type=positive, metavar="N", help=f"look at about so many (default: {tokens})")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="settings",
        metavar="key=value",
        help="turn a knob without training: model.ffn.router.select.threshold=0.4 (or a top_k); may be repeated",
    )
    parser.add_argument("--checkpoint", choices=("newest", "best"), default="newest", help="default: newest")
    parser.add_argument(
        "--json", type=Path, nargs="?", const=Path("-"), metavar="PATH", help="write JSON, without PATH to the terminal"
    )
    add_device(parser)


def positive(text: str) -> int:
    """A whole number above 0.

    Raises: argparse.ArgumentTypeError.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


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

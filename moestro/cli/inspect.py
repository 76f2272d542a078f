"""moestro inspect"""

from argparse import Namespace
from pathlib import Path

from moestro.cli.arguments import Parser, add_run, device_named
from moestro.cli.terminal import as_json


def add_arguments(parser: Parser) -> None:
    """RUN, how it is measured, and --out"""
    add_run(parser, "65,536")
    parser.add_argument("--out", type=Path, metavar="PAGE", help="the page to write (default: RUN/inspect.html)")


def run(arguments: Namespace) -> int:
    """Show where a run's compute goes: experts, layers, tokens, a homogeneous twin, other settings."""
    from rich.console import Console

    from moestro.compare.inspection import write_inspection
    from moestro.recipe.inspection import TOKENS, inspect_run, inspection_table

    device, tokens = device_named(arguments.device), arguments.tokens or TOKENS
    found = inspect_run(arguments.run, arguments.data, device, tokens, arguments.checkpoint, arguments.settings)
    page = write_inspection(found, arguments.out or arguments.run / "inspect.html")
    if not as_json(arguments.json, found):
        Console().print(inspection_table(found))
        print(f"page: {page}")
    return 0

"""moestro inspect"""

from argparse import Namespace
from pathlib import Path

from moestro.cli.arguments import Parser, add_run, device_named
from moestro.cli.terminal import as_json


def add_arguments(parser: Parser) -> None:
    """RUN, how it is measured, --out and --generalization"""
    add_run(parser, "65,536")
    parser.add_argument("--out", type=Path, metavar="PAGE", help="the page to write (default: RUN/inspect.html)")
    parser.add_argument(
        "--generalization",
        action="store_true",
        help="in place of all that: every term of the generalization bound of sparse mixtures (arXiv:2403.17404)",
    )


def run(arguments: Namespace) -> int:
    """Show where a run's compute goes: experts, layers, tokens, a homogeneous twin, other settings."""
    from rich.console import Console

    from moestro.recipe.inspection import TOKENS

    options = (arguments.data, device_named(arguments.device), arguments.tokens or TOKENS)
    options = (arguments.run, *options, arguments.checkpoint, arguments.settings)
    if arguments.generalization:
        from moestro.recipe.generalization import generalization_of_run, generalization_table

        found = generalization_of_run(*options)
        if not as_json(arguments.json, found):
            Console().print(generalization_table(found))
        return 0
    from moestro.compare.inspection import write_inspection
    from moestro.recipe.inspection import inspect_run, inspection_table

    found = inspect_run(*options)
    page = write_inspection(found, arguments.out or arguments.run / "inspect.html")
    if not as_json(arguments.json, found):
        Console().print(inspection_table(found))
        print(f"page: {page}")
    return 0

"""moestro inspect"""

from argparse import Namespace
from pathlib import Path

from moestro.cli.arguments import Parser, add_run, refuse, run_of
from moestro.cli.terminal import as_json


def add_arguments(parser: Parser) -> None:
    """RUN, how it is measured, --out, --generalization and --probe"""
    add_run(parser, "65,536; 8,192 with --probe")
    parser.add_argument("--out", type=Path, metavar="PAGE", help="the page to write (default: RUN/inspect.html)")
    others = parser.add_argument_group("in place of the page, a table")
    instead = others.add_mutually_exclusive_group()
    instead.add_argument(
        "--generalization",
        action="store_true",
        help="every term of the generalization bound of sparse mixtures (arXiv:2403.17404)",
    )
    instead.add_argument(
        "--probe",
        action="store_true",
        help="the loss of every expert on every other expert's tokens, each serving alone",
    )


def run(arguments: Namespace) -> int:
    """Write a page that shows what each expert of a run does: where compute goes, by layer, expert and token.

    It also says what the run would cost and score with equal widths and with other settings of its router.

    examples:
      moestro inspect runs/hmoe-0
      moestro inspect runs/hmoe-0 --probe --tokens 2048
    """
    if not (arguments.generalization or arguments.probe):
        return _page(arguments)
    refuse(arguments, {"out": None}, "{} is where the page goes; --generalization and --probe write none")
    return _probe(arguments) if arguments.probe else _generalization(arguments)


def _generalization(arguments: Namespace) -> int:
    from rich.console import Console

    from moestro.recipe.generalization import TOKENS, generalization_of_run, generalization_table

    found = generalization_of_run(run_of(arguments), arguments.tokens or TOKENS)
    if not as_json(arguments.json, found):
        Console().print(generalization_table(found))
    return 0


def _probe(arguments: Namespace) -> int:
    from rich.console import Console

    from moestro.recipe.probing import TOKENS, probe_of_run, probe_table

    found = probe_of_run(run_of(arguments), arguments.tokens or TOKENS)
    if not as_json(arguments.json, found):
        Console().print(probe_table(found))
    return 0


def _page(arguments: Namespace) -> int:
    from rich.console import Console

    from moestro.compare.inspection import write_inspection
    from moestro.recipe.inspection import TOKENS, inspect_run, inspection_table

    found = inspect_run(run_of(arguments), arguments.tokens or TOKENS)
    page = write_inspection(found, arguments.out or arguments.run / "inspect.html")
    if not as_json(arguments.json, found):
        Console().print(inspection_table(found))
        print(f"page: {page}")
    return 0

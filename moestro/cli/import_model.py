"""moestro import"""

from argparse import Namespace
from pathlib import Path

from moestro.cli.arguments import Parser


def add_arguments(parser: Parser) -> None:
    """SRC, --out, --tokenizer, --link"""
    parser.add_argument("source", type=Path, metavar="SRC", help="a folder in Hugging Face's format; it is only read")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the run folder to make")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="take the tokenizer from here (default: SRC)")
    parser.add_argument("--link", action="store_true", help="copy no weights: the run goes on reading them from SRC")


def run(arguments: Namespace) -> int:
    """Make a run folder of a public checkpoint: train, eval, inspect and export go on from it.

    examples:
      moestro import path/to/OLMoE --out runs/olmoe
      moestro import path/to/Mixtral --out runs/mixtral --link
    """
    from moestro.data.progress import progress_bar
    from moestro.recipe.importing import import_model

    with progress_bar(True) as report:
        made = import_model(arguments.source, arguments.out, arguments.tokenizer, arguments.link, report)
    print(
        f"{arguments.out}: {made.model_type}, {made.parameters:,} parameters"
        + (f", {made.nbytes:,} bytes copied" if made.nbytes else f", read from {arguments.source}")
    )
    print(f"go on with moestro eval {arguments.out}, or moestro train {made.recipe} --out ANOTHER key=value ...")
    return 0

"""moestro eval"""

from argparse import Namespace

from moestro.cli.arguments import Parser, add_run, device_named
from moestro.cli.terminal import as_json


def add_arguments(parser: Parser) -> None:
    """RUN, and how it is measured"""
    add_run(parser, "all")


def run(arguments: Namespace) -> int:
    """Evaluate a run: bits per byte, perplexity, and how each layer uses its experts."""
    from rich.console import Console

    from moestro.recipe.evaluation import evaluate_run, figures_table

    device = device_named(arguments.device)
    figures = evaluate_run(
        arguments.run, arguments.data, device, arguments.tokens, arguments.checkpoint, arguments.settings
    )
    if not as_json(arguments.json, figures):
        Console().print(figures_table(figures))
    return 0

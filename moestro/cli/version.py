"""moestro version"""

from argparse import Namespace

from moestro.cli.arguments import Parser


def add_arguments(parser: Parser) -> None:
    """None."""


def run(arguments: Namespace) -> int:
    """Print the version."""
    from moestro import __version__

    print(f"moestro {__version__}")
    return 0

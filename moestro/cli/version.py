"""moestro version"""

from argparse import Namespace

from moestro.cli.arguments import Parser


def add_arguments(parser: Parser) -> None:
    """None."""


def run(arguments: Namespace) -> int:
    """Print the version, and whether the compiled CPU kernels are in use.

    examples:
      moestro version
    """
    from moestro import __version__
    from moestro.ops import native

    print(f"moestro {__version__}")
    print(f"native kernels: {native.status()}")
    return 0

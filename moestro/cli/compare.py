"""moestro compare"""

import sys
from argparse import Namespace
from pathlib import Path

from moestro.cli.arguments import Parser, add_device, add_recipe, device_named
from moestro.cli.terminal import failed
from moestro.cli.values import positive


def add_arguments(parser: Parser) -> None:
    """RECIPE, key=value ..., --out, --workers, --device"""
    add_recipe(parser, "recipes/compare/", "seeds=[0] evaluations=4")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the runs and the report (default: runs/RECIPE)"
    )
    parser.add_argument(
        "--workers", type=positive, metavar="N", help="runs at a time (default: by the cores of this machine)"
    )
    add_device(parser)


def run(arguments: Namespace) -> int:
    """Train several models at equal compute, and write a table and report.html; the same command continues it.

    examples:
      moestro compare recipes/compare/first_look.yaml
      moestro compare recipes/compare/first_look.yaml seeds=[0] --out runs/one_seed --workers 1
    """
    from rich.console import Console

    from moestro.compare.run import compare
    from moestro.compare.table import comparison_table
    from moestro.train import TrainingStopped

    out = arguments.out or Path("runs") / arguments.recipe.stem
    command = " ".join(["moestro", "compare", str(arguments.recipe), *arguments.overrides])
    try:
        device = device_named(arguments.device)
        results = compare(arguments.recipe, out, arguments.overrides, arguments.workers, None, command, device)
    except TrainingStopped as stopped:
        return failed(f"{stopped}; {out / 'report.html'} shows the runs that are done", 130)
    Console().print(comparison_table(results))
    print(f"report: {out / 'report.html'}")
    broken = [each for each in results["runs"] if each.get("status") == "failed"]
    for each in broken:
        print(f"moestro: error: {each['run_dir']}: {each['error']}", file=sys.stderr)
    return 1 if broken else 0

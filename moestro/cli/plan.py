"""moestro plan"""

from argparse import Namespace
from pathlib import Path

from moestro.cli.arguments import Parser, add_json, add_recipe
from moestro.cli.terminal import as_json
from moestro.cli.values import not_negative, positive, share


def add_arguments(parser: Parser) -> None:
    """RECIPE, key=value ..., --gpus, --gpu and what is assumed"""
    add_recipe(parser)
    parser.add_argument("--gpus", type=positive, default=1, metavar="N", help="processes, one each (default: 1)")
    parser.add_argument(
        "--gpu", metavar="KIND", help="h200, h100, a100, b200, cpu or a YAML file (default: what this machine has)"
    )
    parser.add_argument("--vocab", type=positive, metavar="N", help="tokens, where only the tokenizer's files say it")
    parser.add_argument("--efficiency", type=share, metavar="SHARE", help="of the peak FLOP/s (default: 0.4; cpu: 0.5)")
    loads = parser.add_mutually_exclusive_group()
    loads.add_argument(
        "--skew", type=not_negative, metavar="S", help="Zipf exponent of experts' popularity (default: 0.1)"
    )
    loads.add_argument(
        "--run", type=Path, metavar="RUN", help="measure experts' loads on a run's held-out text instead"
    )
    add_json(parser)


def run(arguments: Namespace) -> int:
    """Say whether a recipe fits this machine, or how it would run best on machines that are not here.

    On paper: memory of the fullest process by part, bytes sent, seconds of a step, and the sections to paste.

    examples:
      moestro plan recipes/peer_million.yaml
      moestro plan recipes/paper/deepseek-v3.yaml --gpus 512 --gpu h200
    """
    from dataclasses import replace

    from rich.console import Console

    from moestro.plan import machine_named, search, workload
    from moestro.plan.loads import loads_of_run
    from moestro.plan.machines import this_machine
    from moestro.plan.report import as_figures, plan_page
    from moestro.plan.search import SKEW
    from moestro.recipe.load import load_recipe

    work = workload(load_recipe(arguments.recipe, arguments.overrides), arguments.vocab)
    machine = machine_named(arguments.gpu) if arguments.gpu else this_machine()
    if arguments.efficiency is not None:
        machine = replace(machine, efficiency=arguments.efficiency)
    measured = None if arguments.run is None else loads_of_run(arguments.run)
    skew = SKEW if arguments.skew is None else arguments.skew
    found = search(work, machine, arguments.gpus, skew, measured)
    if not as_json(arguments.json, as_figures(work, machine.name, arguments.gpus, found)):
        Console().print(plan_page(work, found))
        if not found.fitting and found.too_large:
            print(f"{work.name} does not fit {arguments.gpus} x {machine.name} ({machine.memory / 1e9:.0f} GB)")
    return 0 if found.fitting else 1

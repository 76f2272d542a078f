"""moestro convert"""

from argparse import Namespace
from pathlib import Path
from typing import Any

from moestro.cli.arguments import Parser, UsageError, add_checkpoint, add_device, device_named


def add_arguments(parser: Parser) -> None:
    """SRC, key=value ..., --out, --recipe, --stock, --back, --drop-teacher, --checkpoint, --device"""
    parser.add_argument(
        "source", type=Path, metavar="SRC", help="a run folder of a dense model, or a folder of the Hugging Face format"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="set any key of the recipe: method.top_k=2")
    parser.add_argument("--out", type=Path, required=True, metavar="DST", help="the folder to write")
    parser.add_argument(
        "--recipe",
        type=Path,
        metavar="RECIPE",
        help="how it is converted: a YAML file such as those in recipes/convert/",
    )
    others = parser.add_argument_group("other ways")
    instead = others.add_mutually_exclusive_group()
    instead.add_argument(
        "--stock",
        action="store_true",
        help="write a folder of Mixtral's or Qwen-MoE's format; every expert is a copy of the dense layer",
    )
    instead.add_argument(
        "--back", action="store_true", help="the other way: SRC is a converted run, DST its dense model"
    )
    instead.add_argument(
        "--drop-teacher",
        action="store_true",
        help="SRC is a converted run, DST the same without the frozen dense layers that taught it",
    )
    add_checkpoint(parser)
    add_device(parser)


def run(arguments: Namespace) -> int:
    """Turn a dense model into a mixture of experts, or back, and check that it computes the same.

    examples:
      moestro convert runs/dense-0 --recipe recipes/convert/factorllm.yaml --out runs/moe
      moestro convert runs/dense-0 --recipe recipes/convert/upcycle.yaml --out runs/moe method.top_k=2
      moestro convert runs/moe --back --out runs/dense-again
    """
    if arguments.back or arguments.drop_teacher:
        return _inverse(arguments)
    from rich.console import Console

    from moestro.convert.plan import load_conversion
    from moestro.convert.report import report_table
    from moestro.convert.run import convert_run

    conversion = load_conversion(arguments.recipe, arguments.overrides)
    if arguments.stock:
        return _stock(arguments, conversion)
    device = device_named(arguments.device)
    report = convert_run(arguments.source, arguments.out, conversion, device, arguments.checkpoint)
    Console().print(report_table(report))
    print(f"{arguments.out}: go on with moestro train {arguments.out / 'recipe.yaml'} --out {arguments.out}")
    return 0


def _stock(arguments: Namespace, conversion: Any) -> int:
    from moestro.convert.stock import upcycle_folder

    made = upcycle_folder(arguments.source, arguments.out, conversion.method, conversion.seed)
    what = f"{made['layers']} layers of {made['n_experts']} experts, each equal to the dense network"
    print(f"{arguments.out}: {what}; {made['family']}")
    return 0


def _inverse(arguments: Namespace) -> int:
    if arguments.recipe or arguments.overrides:
        given = arguments.recipe or arguments.overrides[0]
        raise UsageError(f"{given}: --back and --drop-teacher take no recipe and no values")
    from moestro.convert.back import drop_teachers, restore_dense

    invert = restore_dense if arguments.back else drop_teachers
    blocks = invert(arguments.source, arguments.out, arguments.checkpoint)
    what = "dense again" if arguments.back else "without its teacher"
    print(f"{arguments.out}: {len(blocks)} layers, each {what}")
    return 0

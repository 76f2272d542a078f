"""moestro export"""

from argparse import Namespace
from pathlib import Path

from moestro.cli.arguments import Parser, add_checkpoint, extra, size


def add_arguments(parser: Parser) -> None:
    """RUN, --out, and what the folder is like"""
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write")
    parser.add_argument(
        "--format",
        choices=("moestro", "stock"),
        help="moestro: models of ours, with the code that loads them; stock: Llama, Mixtral or Qwen2-MoE, where one of "
        "them computes the same, or what a pretrained model came as (default: moestro, for pretrained models stock)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="type of the weights (default: as they were trained)",
    )
    parser.add_argument(
        "--shard-size",
        type=size,
        default=size("5GB"),
        metavar="SIZE",
        help="most bytes in one file: 500MB (default: 5GB)",
    )
    add_checkpoint(parser)
    parser.add_argument(
        "--license", metavar="NAME", help="licence of the weights, for the model card: apache-2.0, cc-by-4.0, ..."
    )
    parser.add_argument("--unfinished", action="store_true", help="export a run whose training is not over")
    parser.add_argument(
        "--force", action="store_true", help="replace an earlier export in DIR, once the new one is whole"
    )


def run(arguments: Namespace) -> int:
    """Write a run's model as a folder that transformers, lm-eval and other tools load.

    examples:
      moestro export runs/hmoe-0 --out exported/hmoe
      moestro export runs/moe-0 --out exported/mixtral --format stock --dtype bfloat16
    """
    with extra("hf"):
        from moestro.export.folder import Choices, export_run
    choices = Choices(
        arguments.format, arguments.dtype, arguments.shard_size, arguments.checkpoint, arguments.unfinished,
        arguments.force, arguments.license,
    )  # fmt: skip
    done = export_run(arguments.run, arguments.out, choices)
    print(f"{done.path}: {done.architecture}, {done.n_parameters:,} parameters, {done.nbytes / 1e6:,.1f} MB of weights")
    return 0

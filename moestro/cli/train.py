"""moestro train"""

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from moestro.cli.arguments import Parser, UsageError, add_device, add_recipe, device_named, refuse
from moestro.cli.values import positive


def add_arguments(parser: Parser) -> None:
    """RECIPE, key=value ..., --out, --device, --nproc, --max-restarts"""
    add_recipe(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="run folder (default: runs/RECIPE-SEED)")
    add_device(parser)
    parser.add_argument(
        "--nproc", type=positive, default=1, metavar="N", help="train with N processes on this host (default: 1)"
    )
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=0,
        metavar="N",
        help="with --nproc: how often all start again after one was lost (default: 0)",
    )


def run(arguments: Namespace) -> int:
    """Train a recipe; the same command continues a run that was interrupted.

    Writes a run folder: recipe.yaml with every default, metrics.jsonl, checkpoints, tokenizer, done.json.
    Under torchrun each process is a rank.

    examples:
      moestro train recipes/hmoe.yaml
      moestro train recipes/hmoe.yaml train.budget.steps=50 optim.lr=1e-3 --out runs/short
      moestro train recipes/peer.yaml 'data.source={kind: text, paths: my/folder}'
      moestro train recipes/hmoe.yaml --nproc 2
    """
    from moestro.parallel.ranks import speaks
    from moestro.plan import require_ranks_fit
    from moestro.recipe.build import run_training
    from moestro.train import TrainingStopped, display_on

    recipe = load(arguments)
    if arguments.nproc != 1:
        return on_ranks(arguments)
    refuse(arguments, {"max_restarts": 0}, "{} needs --nproc")
    out = arguments.out or Path("runs") / f"{recipe.name}-{recipe.train.value('seed')}"
    try:
        display = display_on(sys.stderr, recipe.name)
        result = run_training(recipe, out, device_named(arguments.device), display, require_ranks_fit=require_ranks_fit)
    except TrainingStopped as stopped:
        if speaks():
            print(f"moestro: {stopped}", file=sys.stderr)
        return 0
    figures = result["eval"]
    if speaks():
        print(
            f"{out}: step {result['step']:,}, {result['tokens']:,} tokens, {result['flops']:.3g} FLOPs; held out: "
            f"{figures['bpb']:.4f} bits per byte, perplexity {figures['perplexity']:.2f}"
        )
    return 0


def load(arguments: Namespace) -> Any:
    """The recipe; where it is wrong, one of several ranks says so.

    Raises: RecipeError.
    """
    from moestro.parallel.ranks import speaks
    from moestro.recipe.load import RecipeError, load_recipe

    try:
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        recipe.parallel.build()
    except RecipeError as error:
        if speaks():
            raise
        raise SystemExit(2) from error
    return recipe


def on_ranks(arguments: Namespace) -> int:
    """The same command on several ranks of this host.

    Raises: UsageError where there cannot be as many.
    """
    from moestro.parallel.launch import launch
    from moestro.parallel.ranks import launched

    if arguments.max_restarts < 0:
        raise UsageError(f"--max-restarts {arguments.max_restarts}, allowed: at least 0")
    if launched():
        raise UsageError("--nproc starts processes, which torchrun did here already: give one of the two")
    device = ["--device", arguments.device] if arguments.device else []
    out = ["--out", str(arguments.out)] if arguments.out else []
    traceback = ["--traceback"] if arguments.traceback else []
    words = ["train", str(arguments.recipe), *arguments.overrides, *out, *device, *traceback]
    return launch(arguments.nproc, words, arguments.max_restarts)

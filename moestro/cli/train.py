"""moestro train"""

import sys
from argparse import Namespace
from pathlib import Path

from moestro.cli.arguments import Parser, add_device, add_recipe, device_named


def add_arguments(parser: Parser) -> None:
    """RECIPE, key=value ..., --out, --device"""
    add_recipe(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="run folder (default: runs/RECIPE-SEED)")
    add_device(parser)


def run(arguments: Namespace) -> int:
    """Train a recipe; the same command continues a run that was interrupted.

    Writes a run folder: recipe.yaml with every default, metrics.jsonl, checkpoints, tokenizer, done.json.

    examples:
      moestro train recipes/hmoe.yaml
      moestro train recipes/hmoe.yaml train.budget.steps=50 optim.lr=1e-3 --out runs/short
      moestro train recipes/peer.yaml 'data.source={kind: text, paths: my/folder}'
    """
    from moestro.recipe.build import run_training
    from moestro.recipe.load import load_recipe
    from moestro.train import TrainingStopped, display_on

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    out = arguments.out or Path("runs") / f"{recipe.name}-{recipe.train.value('seed')}"
    try:
        result = run_training(recipe, out, device_named(arguments.device), display_on(sys.stderr, recipe.name))
    except TrainingStopped as stopped:
        print(f"moestro: {stopped}", file=sys.stderr)
        return 0
    figures = result["eval"]
    print(
        f"{out}: step {result['step']:,}, {result['tokens']:,} tokens, {result['flops']:.3g} FLOPs; held out: "
        f"{figures['bpb']:.4f} bits per byte, perplexity {figures['perplexity']:.2f}"
    )
    return 0

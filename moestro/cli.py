"""The command line: verbs, each of which calls one function below. Nothing heavy is imported before arguments are read.

Exit codes: 0 done (or training stopped by a signal, and saved), 1 failed while running, 2 a mistake in the command or
recipe, 130 a comparison that was interrupted.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from moestro.recipe.syntax import RecipeError, nearest, unknown

# What can go wrong without a mistake in this package; anything else keeps its traceback.
FAILURES = (RuntimeError, ValueError, OSError, ImportError, ArithmeticError, MemoryError)


class UsageError(Exception):
    """A command that cannot be understood."""


class Parser(argparse.ArgumentParser):
    """Raises `UsageError` in place of printing its usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(words)
    except UsageError as error:
        return _fail(f"{error}", 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except FAILURES as error:
        if "--traceback" in words:
            raise
        return _fail(_told(error), 2 if isinstance(error, RecipeError) else 1)


def _told(error: Exception) -> str:
    """What an error says, in one line; where it is none of this package's own, how to learn more."""
    message = " ".join(str(error).split()) or type(error).__name__
    own = type(error).__module__.split(".")[0] == __package__
    return message if own else f"{message} ({type(error).__name__}; add --traceback to see where)"


def _fail(message: str, code: int) -> int:
    print(f"moestro: error: {message}", file=sys.stderr)
    return code


def _stopped(stopped: Exception) -> int:
    print(f"moestro: {stopped}", file=sys.stderr)
    return 0


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0 if words else 2
    verb = "version" if words[0] == "--version" else words[0]
    if verb not in VERBS:
        raise UsageError(unknown("option" if verb.startswith("-") else "verb", verb, [*VERBS, "--help", "--version"]))
    parser = Parser(prog=f"moestro {verb}", description=VERBS[verb].__doc__, allow_abbrev=False)
    ARGUMENTS[verb](parser)
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error arose")
    arguments, rest = parser.parse_known_intermixed_args(words[1:])
    if rest:
        raise UsageError(f"{_left_over(parser, rest[0])} (moestro {verb})")
    return VERBS[verb](arguments)


def _left_over(parser: Parser, word: str) -> str:
    if not word.startswith("-"):
        return f"unexpected {word!r}"
    options = [name for action in parser._actions for name in action.option_strings]
    return unknown("option", word.split("=")[0], options)


def _overview() -> str:
    lines = [f"  {verb:<9} {(run.__doc__ or '').splitlines()[0]}" for verb, run in VERBS.items()]
    return "\n".join(
        [
            "usage: moestro VERB ...   (moestro VERB --help explains one)",
            "",
            *lines,
            "",
            "Values of a recipe can be set on the command line: moestro train recipes/hmoe.yaml optim.lr=1e-3",
        ]
    )


def train(arguments: argparse.Namespace) -> int:
    """Train a recipe; the same command continues a run that was interrupted."""
    from moestro.recipe.build import run_training
    from moestro.recipe.load import load_recipe
    from moestro.train import TrainingStopped, display_on

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    out = arguments.out or Path("runs") / f"{recipe.name}-{recipe.train.value('seed')}"
    try:
        result = run_training(recipe, out, _device(arguments.device), display_on(sys.stderr, recipe.name))
    except TrainingStopped as stopped:
        return _stopped(stopped)
    figures = result["eval"]
    print(
        f"{out}: step {result['step']:,}, {result['tokens']:,} tokens, {result['flops']:.3g} FLOPs; held out: "
        f"{figures['bpb']:.4f} bits per byte, perplexity {figures['perplexity']:.2f}"
    )
    return 0


def evaluate(arguments: argparse.Namespace) -> int:
    """Evaluate a run: bits per byte, perplexity, and how each layer uses its experts."""
    from rich.console import Console

    from moestro.recipe.evaluation import evaluate_run, figures_table

    device = _device(arguments.device)
    figures = evaluate_run(
        arguments.run, arguments.data, device, arguments.tokens, arguments.checkpoint, arguments.settings
    )
    if not _as_json(arguments.json, figures):
        Console().print(figures_table(figures))
    return 0


def inspect(arguments: argparse.Namespace) -> int:
    """Show where a run's compute goes: experts, layers, tokens, a homogeneous twin, other settings."""
    from rich.console import Console

    from moestro.compare.inspection import write_inspection
    from moestro.recipe.inspection import TOKENS, inspect_run, inspection_table

    device, tokens = _device(arguments.device), arguments.tokens or TOKENS
    found = inspect_run(arguments.run, arguments.data, device, tokens, arguments.checkpoint, arguments.settings)
    page = write_inspection(found, arguments.out or arguments.run / "inspect.html")
    if not _as_json(arguments.json, found):
        Console().print(inspection_table(found))
        print(f"page: {page}")
    return 0


def _as_json(path: Path | None, figures: dict[str, Any]) -> bool:
    """Write figures where they are asked for; True where that is the terminal, which then gets nothing else."""
    text = json.dumps(figures, indent=1)
    if path == Path("-"):
        print(text)
        return True
    if path is not None:
        path.write_text(text + "\n", encoding="utf-8")
    return False


def compare(arguments: argparse.Namespace) -> int:
    """Train a set of arms at equal compute, and write the table and the report."""
    from rich.console import Console

    from moestro.compare.run import compare as run_comparison
    from moestro.compare.table import comparison_table
    from moestro.train import TrainingStopped

    out = arguments.out or Path("runs") / arguments.recipe.stem
    command = " ".join(["moestro", "compare", str(arguments.recipe), *arguments.overrides])
    try:
        device = _device(arguments.device)
        results = run_comparison(arguments.recipe, out, arguments.overrides, arguments.workers, None, command, device)
    except TrainingStopped as stopped:
        return _fail(f"{stopped}; {out / 'report.html'} shows the runs that are done", 130)
    Console().print(comparison_table(results))
    print(f"report: {out / 'report.html'}")
    failed = [run for run in results["runs"] if run.get("status") == "failed"]
    for run in failed:
        print(f"moestro: error: {run['run_dir']}: {run['error']}", file=sys.stderr)
    return 1 if failed else 0


def prepare(arguments: argparse.Namespace) -> int:
    """Build a recipe's tokenizer and token shards, and nothing else."""
    from moestro.recipe.build import build_data
    from moestro.recipe.load import load_recipe

    dataset = build_data(load_recipe(arguments.recipe, arguments.overrides)).prepare()
    print(
        f"{dataset.name}: {dataset.n_train_tokens:,} training tokens, {dataset.n_val_tokens:,} held out "
        f"({dataset.n_val_bytes:,} bytes), {dataset.vocab_size:,} different ones, in {dataset.folder}"
    )
    return 0


def version(arguments: argparse.Namespace) -> int:
    """Print the version."""
    from moestro import __version__

    print(f"moestro {__version__}")
    return 0


def _device(name: str | None) -> str:
    """The device to use: the one asked for, or CUDA where there is one, else the CPU."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if kind not in there or (index and not index.isdecimal()):
        raise UsageError(f"device {name!r}{nearest(kind, there) or ';'} allowed: cpu, cuda, cuda:N, mps")
    if int(index or 0) >= there[kind]:
        raise UsageError(f"device {name!r}: this machine has {there[kind]} of kind {kind}")
    return name


def _recipe_arguments(parser: Parser) -> None:
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="a value to set: optim.lr=1e-3")


def _device_argument(parser: Parser) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:N or mps (default: cuda where there is one, else cpu)")


def _train_arguments(parser: Parser) -> None:
    _recipe_arguments(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="run folder (default: runs/<recipe>-<seed>)")
    _device_argument(parser)


def _compare_arguments(parser: Parser) -> None:
    _recipe_arguments(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the runs (default: runs/<recipe>)")
    parser.add_argument("--workers", type=_positive, metavar="N", help="runs at a time (default: by cores)")
    _device_argument(parser)


def _evaluate_arguments(parser: Parser) -> None:
    _run_arguments(parser, "all")


def _inspect_arguments(parser: Parser) -> None:
    _run_arguments(parser, "65,536")
    parser.add_argument("--out", type=Path, metavar="PAGE", help="the page to write (default: RUN/inspect.html)")


def _run_arguments(parser: Parser, tokens: str) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--data", metavar="PATH|SOURCE", help="text to look at (default: the run's held-out text)")
    parser.add_argument("--tokens", type=_positive, metavar="N", help=f"look at about so many (default: {tokens})")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="settings",
        metavar="key=value",
        help="turn a knob without training: model.ffn.router.select.threshold=0.4 (or a top_k); may be repeated",
    )
    parser.add_argument("--checkpoint", choices=("newest", "best"), default="newest", help="default: newest")
    parser.add_argument(
        "--json", type=Path, nargs="?", const=Path("-"), metavar="PATH", help="write JSON, without PATH to the terminal"
    )
    _device_argument(parser)


def _no_arguments(parser: Parser) -> None:
    """`version` takes none."""


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


VERBS: dict[str, Callable[[argparse.Namespace], int]] = {
    "train": train,
    "eval": evaluate,
    "inspect": inspect,
    "compare": compare,
    "prepare": prepare,
    "version": version,
}
ARGUMENTS: dict[str, Callable[[Any], None]] = {
    "train": _train_arguments,
    "eval": _evaluate_arguments,
    "inspect": _inspect_arguments,
    "compare": _compare_arguments,
    "prepare": _recipe_arguments,
    "version": _no_arguments,
}

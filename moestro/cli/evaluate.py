"""moestro eval"""

import sys
from argparse import Namespace
from typing import Any

from moestro.cli.arguments import Parser, UsageError, add_dtype, add_run, extra, opened_model, refuse, run_of
from moestro.cli.terminal import as_json
from moestro.cli.values import positive

# what only tasks take, and what they do not, as it is where nobody says so
OF_TASKS: dict[str, Any] = {
    **dict.fromkeys(("dtype", "limit", "seed", "batch_size", "max_length")),
    "trust_task_code": False,
}
OF_TEXT: dict[str, Any] = {"tokens": None, "settings": []}


def add_arguments(parser: Parser) -> None:
    """RUN, how it is measured, --tasks and what belongs to them"""
    add_run(parser, "all")
    tasks = parser.add_argument_group("tasks of the literature, through lm-eval, in place of all that")
    tasks.add_argument(
        "--tasks",
        metavar="NAME,...",
        help="these tasks, or files of tasks; papers: those of the papers; help: print all names. RUN may then be "
        "any model's folder, and --data is the folder that the tasks' files lie in",
    )
    tasks.add_argument("--limit", type=positive, metavar="N", help="only the first N rows of each task")
    tasks.add_argument("--seed", type=int, metavar="N", help="seed of few-shot draws and of resampling (default: 0)")
    tasks.add_argument("--batch-size", type=positive, metavar="N", help="sequences at a time (default: 8)")
    tasks.add_argument(
        "--max-length", type=positive, metavar="N", help="tokens of context (default: as many as the model has)"
    )
    tasks.add_argument(
        "--trust-task-code",
        action="store_true",
        help="let files of tasks run code that they name (else refused)",
    )
    add_dtype(tasks)


def run(arguments: Namespace) -> int:
    """Measure a run: bits per byte, perplexity, how its experts are used; or score any model on tasks.

    examples:
      moestro eval runs/hmoe-0
      moestro eval runs/hmoe-0 --data my/other.txt --json figures.json
      moestro eval runs/hmoe-0 --tasks piqa,hellaswag --data path/to/data --limit 100
    """
    if arguments.tasks is not None:
        return _tasks(arguments)
    from rich.console import Console

    from moestro.recipe.evaluation import evaluate_run, figures_table

    refuse(arguments, OF_TASKS, "{} needs --tasks")
    figures = evaluate_run(run_of(arguments), arguments.tokens)
    if not as_json(arguments.json, figures):
        Console().print(figures_table(figures))
    return 0


def _tasks(arguments: Namespace) -> int:
    refuse(arguments, OF_TEXT, "{} does not go with --tasks")
    with extra("eval"):
        from moestro.harness import ScoredModel, evaluate_tasks, resolve_tasks, task_names, tasks_table
    if arguments.tasks == "help":
        print("\n".join(task_names()))
        return 0
    trusted = arguments.trust_task_code
    tasks = resolve_tasks([name.strip() for name in arguments.tasks.split(",")], trusted)
    if arguments.data is None:
        raise UsageError("--tasks needs --data FOLDER, the folder that the tasks' files lie in")
    from rich.console import Console

    opened = opened_model(arguments, arguments.run)
    scored = ScoredModel(*opened, arguments.batch_size or 8, arguments.max_length)
    seed = arguments.seed or 0

    def begun(name: str) -> None:
        print(f"moestro: {name}", file=sys.stderr)

    figures = evaluate_tasks(scored, tasks, arguments.data, arguments.limit, seed, begun, trusted)
    figures = {"model": str(arguments.run), **figures}
    if not as_json(arguments.json, figures):
        Console().print(tasks_table(figures))
    return 0

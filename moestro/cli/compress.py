"""moestro compress"""

from argparse import Namespace
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moestro.cli.arguments import Parser, UsageError, add_device, device_named, extra, refuse
from moestro.cli.values import positive
from moestro.recipe.syntax import parse_yaml

if TYPE_CHECKING:
    from moestro.compress.healed import Heal
    from moestro.compress.measuring import Question

# what makes a plan, and what it is where nobody says so
OF_PLANS: dict[str, Any] = {
    **{"method": None, "ratio": None, "plan_only": False, "per_layer": False, "semantics": "slice"},
    **{"reference": None, "calib": None, "seed": 0, "option": []},
}

# what else --translate does not look at
OF_FOLDERS: dict[str, Any] = {
    **{"plan": None, "format": "stock", "densify": False, "uniform": False, "eval": None, "tasks": None, "heal": None},
}


def add_arguments(parser: Parser) -> None:
    """SRC DST, what is to go and how it is chosen, what is written, what is measured"""
    parser.add_argument(
        "source", type=Path, metavar="SRC", help="a model's folder in Hugging Face's format, or a run folder; only read"
    )
    parser.add_argument("destination", type=Path, metavar="DST", help="the folder to write; with --plan-only the plan")
    _add_choice(parser)
    written = parser.add_argument_group("what is written")
    written.add_argument(
        "--format",
        choices=("stock", "padded", "custom"),
        default="stock",
        help="stock (default) loads wherever SRC does; padded and custom hold layers of different numbers of experts",
    )
    written.add_argument("--densify", action="store_true", help="multiply low-rank factors out again: loads everywhere")
    written.add_argument("--uniform", action="store_true", help="keep as many experts in every layer as the largest")
    written.add_argument("--plan-only", action="store_true", help="write the plan to DST (a .json file) and stop")
    written.add_argument("--plan", type=Path, metavar="PLAN", help="apply this plan in place of making one")
    written.add_argument("--translate", action="store_true", help="only write DeepSeek-MoE 16B as the family it equals")
    _add_measures(parser)
    _add_healing(parser)
    add_device(parser)


def _add_choice(parser: Parser) -> None:
    choice = parser.add_argument_group("which experts go")
    choice.add_argument("--method", help="reap, frequency, merge, width, ...: docs/compress.md has a table")
    choice.add_argument("--ratio", type=float, help="share of the experts that goes: 0.25")
    choice.add_argument("--per-layer", action="store_true", help="let layers lose different numbers of experts")
    choice.add_argument(
        "--semantics",
        choices=("slice", "remap", "zero"),
        default="slice",
        help="tokens of an expert that went: choose among the others (slice, default), go to the one that it was "
        "merged into (remap), or get nothing (zero)",
    )
    choice.add_argument("--reference", type=Path, metavar="BASE", help="the model before fine-tuning, for router-norm")
    choice.add_argument("--calib", metavar="PATH|SOURCE", help="text that most methods look at")
    choice.add_argument("--calib-tokens", type=positive, default=65_536, metavar="N", help="of it (default: 65,536)")
    choice.add_argument("--seq-len", type=positive, default=512, metavar="N", help="tokens of a window (default: 512)")
    choice.add_argument("--seed", type=int, default=0, metavar="N", help="of methods that draw (default: 0)")
    choice.add_argument(
        "--option", action="append", default=[], metavar="key=value", help="an option of the method; may be repeated"
    )


def _add_healing(parser: Parser) -> None:
    healing = parser.add_argument_group("healing")
    healing.add_argument(
        "--heal",
        choices=("lora", "router-kd"),
        help="train what is left: low-rank additions, or the routers towards SRC's probabilities",
    )
    healing.add_argument(
        "--heal-text", metavar="PATH|SOURCE", help="text to heal on (default: that of --calib; a run has its own)"
    )
    healing.add_argument(
        "--heal-option",
        action="append",
        default=[],
        metavar="key=value",
        help="steps (100), lr (0.001), rank (16), alpha (32), clip (1); may be repeated",
    )


def _add_measures(parser: Parser) -> None:
    measures = parser.add_argument_group("measured before and after")
    measures.add_argument(
        "--eval",
        nargs="?",
        const="",
        metavar="PATH|SOURCE",
        help="perplexity, speed and memory on this held-out text (a run has text of its own)",
    )
    measures.add_argument("--eval-tokens", type=positive, default=65_536, metavar="N", help="of it (default: 65,536)")
    measures.add_argument(
        "--tasks", metavar="NAME,...", help="with --eval: tasks of lm-eval too (moestro eval X --tasks help lists them)"
    )
    measures.add_argument("--data", type=Path, metavar="FOLDER", help="the folder that the tasks' files lie in")
    measures.add_argument("--limit", type=positive, metavar="N", help="only the first N rows of each task")


def run(arguments: Namespace) -> int:
    """Remove, merge, narrow or quantise the experts of a model, and write it in its own format.

    examples:
      moestro compress runs/hmoe-0 runs/narrow --method width --ratio 0.5 --per-layer --eval
      moestro compress path/to/olmoe out --method reap --ratio 0.25 --calib text.txt
      moestro compress path/to/olmoe plan.json --method reap --ratio 0.25 --calib text.txt --plan-only
      moestro compress path/to/olmoe out --plan plan.json
    """
    from moestro.compress.plan_file import read_plan
    from moestro.compress.running import applied_to, compressed, plan_for, wanted_by

    # texts and tasks that are none are refused before anything is done
    if arguments.plan_only:
        refuse(arguments, {"eval": None, "heal": None}, "--plan-only writes no model; it does not go with {}")
    if arguments.translate:
        refuse(arguments, {**OF_PLANS, **OF_FOLDERS}, "--translate writes the same model; it does not go with {}")
    question, heal = _question(arguments), _heal(arguments)
    if arguments.translate:
        from moestro.compress.deepseek import translated

        print(f"wrote {translated(arguments.source, arguments.destination)}")
        return 0
    if arguments.plan is not None:
        refuse(arguments, OF_PLANS, "--plan says what is done; it does not go with {}")
        plan, output = read_plan(arguments.plan), _output(arguments)
        asked: dict[str, Any] = {"plan": plan, "output": output}
        quantise = plan.quantise
        make = partial(applied_to, arguments.source, plan, output=output, plan_path=arguments.plan, progress=_say)
    elif arguments.plan_only:
        if arguments.destination.suffix != ".json":
            raise UsageError(f"{arguments.destination}: with --plan-only DST is the plan to write, a .json file")
        plan_for(_request(arguments), arguments.destination)
        print(f"plan: {arguments.destination}")
        return 0
    else:
        request = _request(arguments)
        asked, make = wanted_by(request), partial(compressed, request, progress=_say)
        quantise = request.options.get("quantise")
    folder = _made(arguments, make, heal, quantise, asked, question)
    print(f"wrote {folder}")
    _report(arguments.source, folder, question)
    return 0


def _made(
    arguments: Namespace,
    make: Callable[[Path], Path],
    heal: "Heal | None",
    quantise: Any,
    asked: Mapping[str, Any],
    question: "Question | None",
) -> Path:
    if heal is None:
        return make(arguments.destination)
    from moestro.compress.healed import healed, require_healable

    require_healable(arguments.source, quantise)
    return healed(arguments.source, make, arguments.destination, heal, asked, question)


def _heal(arguments: Namespace) -> "Heal | None":
    if arguments.heal is None:
        refuse(arguments, {"heal_text": None, "heal_option": []}, "without --heal nothing is healed: {}")
        return None
    from dataclasses import fields

    from moestro.compress.healed import Heal
    from moestro.compress.healing import Healing
    from moestro.compress.text import healing_text

    options = dict(_option(text, "--heal-option") for text in arguments.heal_option)
    allowed = [field.name for field in fields(Healing)]
    if unknown := [name for name in options if name not in allowed]:
        raise UsageError(f"--heal-option {unknown[0]}: allowed: {', '.join(allowed)}")
    try:
        settings = Healing(**options)
    except (TypeError, ValueError) as error:
        raise UsageError(f"--heal-option: {error}") from error
    text = arguments.heal_text or arguments.calib
    heal = Heal(arguments.heal, text, settings, arguments.seq_len, arguments.seed, device_named(arguments.device))
    healing_text(heal.request(arguments.source), settings.steps)
    return heal


def _question(arguments: Namespace) -> "Question | None":
    from moestro.compress.measuring import Question, held_out

    tasks: tuple[str, ...] = ()
    if arguments.tasks is not None:
        if arguments.eval is None or arguments.data is None:
            raise UsageError("--tasks needs --eval, and --data FOLDER, the folder that the tasks' files lie in")
        with extra("eval"):
            from moestro.harness import resolve_tasks
        tasks = tuple(resolve_tasks([name.strip() for name in arguments.tasks.split(",")]))
    if arguments.eval is None:
        return None
    text, device = arguments.eval or None, device_named(arguments.device)
    if arguments.data is not None and not arguments.data.is_dir():
        raise UsageError(f"--data {arguments.data}: no such folder")
    question = Question(text, arguments.eval_tokens, arguments.seq_len, device, tasks, arguments.data, arguments.limit)
    held_out(arguments.source, question)
    return question


def _report(source: Path, folder: Path, question: "Question | None") -> None:
    """report.json, the model card's section and the page, in the folder."""
    from moestro.compare.compression import write_compression
    from moestro.compress.applying import PAGE
    from moestro.compress.report import figures, reported, write_report

    found = reported(source, folder, question)
    rows = figures(found)
    print(f"report: {write_report(found, folder)}, {write_compression(found, rows, folder / PAGE)}")
    for name, before, after in rows:
        print(f"{name:<20} {before:>16} {after:>16}")
    if "quantised_share" in found["after"]:
        print(f"{found['after']['quantised_share']:.1%} of its numbers are stored in 8 bits or fewer")
    for line in found["warnings"]:
        print(f"warning: {line}")


def _request(arguments: Namespace) -> Any:
    from moestro.compress.methods import METHODS, Request

    if arguments.method is None or arguments.ratio is None:
        raise UsageError(f"--method and --ratio are needed, or --plan; methods: {', '.join(METHODS)}")
    return Request(
        arguments.source,
        arguments.method,
        arguments.ratio,
        _output(arguments),
        arguments.semantics,
        arguments.per_layer,
        arguments.reference,
        arguments.calib,
        arguments.calib_tokens,
        arguments.seq_len,
        device_named(arguments.device),
        arguments.seed,
        dict(_option(text) for text in arguments.option),
    )


def _output(arguments: Namespace) -> Any:
    from moestro.compress.feasible import Output

    return Output(arguments.format, arguments.densify, arguments.uniform)


def _option(text: str, which: str = "--option") -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UsageError(f"{which} {text!r} is not of the form key=value")
    return name, parse_yaml(value, f"{which} {name}")


def _say(file: str, done: int, total: int) -> None:
    print(f"{done + 1}/{total} {file}", flush=True)

"""What verbs share that run models larger than memory: sizes, the plan of a session, a model to continue texts with."""

import argparse
import re
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moestro.cli.arguments import Parser, UsageError, device_named, extra, opened_model

if TYPE_CHECKING:
    from moestro.generation import TextModel
    from moestro.offload.policies import Policy
    from moestro.offload.session import Plan

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}

# options of a plan, and what they are where nobody says so
OF_PLANS: dict[str, Any] = {
    **{"exact": False, "low": "int4", "low_share": 0.25, "t1": 0.6, "t2": 0.9, "policy": [], "prefetch": 0},
    **{"hold": "files", "cooperative": False, "renormalise": False, "store": None, "calibrate": None},
}


def add_memory(parser: Parser) -> None:
    """--memory, and what goes with it."""
    parser.add_argument(
        "--memory",
        type=size,
        metavar="SIZE",
        help="keep no more of the weights in memory: experts are brought when tokens ask for them (docs/offload.md)",
    )
    add_plan(parser)


def add_plan(parser: Parser) -> None:
    """How experts are kept, brought and quantised."""
    plan = parser.add_argument_group("how experts are kept")
    plan.add_argument("--exact", action="store_true", help="no LOW copies, nothing skipped: the same bits as in memory")
    plan.add_argument("--low", default="int4", metavar="CODEC", help="LOW copies: int8, int4 (default), int2, bf16")
    plan.add_argument(
        "--low-share", type=float, default=0.25, metavar="SHARE", help="of the slots' memory (default: 0.25)"
    )
    plan.add_argument("--t1", type=float, default=0.6, help="scores up to it ask for HIGH (default: 0.6)")
    plan.add_argument("--t2", type=float, default=0.9, help="up to it for LOW, above for nothing (default: 0.9)")
    plan.add_argument(
        "--policy",
        action="append",
        default=[],
        metavar="NAME",
        help="lru (default), lfu, lhu, fld, lcu, mix or mix:LRU,LFU,LHU,FLD; replay takes several",
    )
    plan.add_argument("--prefetch", type=int, default=0, metavar="DEPTH", help="layers to look ahead (default: 0)")
    plan.add_argument("--hold", choices=("files", "host"), default="files", help="where experts wait (default: files)")
    plan.add_argument("--cooperative", action="store_true", help="with --hold host: compute misses there")
    plan.add_argument("--renormalise", action="store_true", help="after skips, scale gates to the sum that all had")
    plan.add_argument("--store", type=Path, metavar="DIR", help="LOW copies (default: SRC.offload-CODEC beside SRC)")
    plan.add_argument("--calibrate", type=Path, metavar="FILE", help="text by which LOW copies are quantised")


def size(text: str) -> int:
    """Bytes: 8GiB, 500MB, 1.5g, 4096.

    Raises: argparse.ArgumentTypeError.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", text.lower())
    if found is None or not float(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; allowed: 8GiB, 500MB, 4096 and such")
    return int(float(found[1]) * UNITS[found[2] or ""])


def plan_of(arguments: Namespace) -> "Plan":
    from moestro.offload.codecs import codec_named
    from moestro.offload.scorer import Thresholds
    from moestro.offload.session import Plan

    if len(arguments.policy) > 1:
        raise UsageError("--policy: one to run with; replay takes several")
    exact = arguments.exact or arguments.t1 == 1
    if exact and arguments.calibrate:
        raise UsageError("--calibrate is for LOW copies; exact runs (--exact, --t1 1) have none")
    return Plan(
        arguments.memory,
        None if exact else codec_named(arguments.low),
        arguments.low_share,
        Thresholds() if exact else Thresholds(arguments.t1, arguments.t2),
        policies_of(arguments, ["lru"])[0],
        arguments.prefetch,
        arguments.hold == "host",
        arguments.cooperative,
        arguments.renormalise,
    )


def policies_of(arguments: Namespace, default: list[str]) -> "list[Policy]":
    from moestro.offload.policies import policy_named

    return [policy_named(name) for name in arguments.policy or default]


def told(text: str) -> None:
    """Progress, where it does not mix with results."""
    print(text, file=sys.stderr)


@contextmanager
def opened_text_model(arguments: Namespace) -> "Iterator[TextModel]":
    """Inside, the model that the arguments of `add_model` name, whole or, with --memory, its experts where they lie.

    Raises: UsageError for options that do not go together; what opening raises.
    """
    if arguments.memory is None:
        if given := [name for name in OF_PLANS if getattr(arguments, name) != OF_PLANS[name]]:
            raise UsageError(f"--{given[0].replace('_', '-')} is for models larger than memory: give --memory, too")
        opened = opened_model(arguments, arguments.model)
        from moestro.generation import TextModel

        yield TextModel(*opened)
        return
    for name, default in (("dtype", None), ("checkpoint", "newest")):
        if getattr(arguments, name) != default:
            raise UsageError(f"--{name} does not go with --memory: experts are computed as they lie")
    if arguments.calibrate:
        raise UsageError("--calibrate does not go with it: moestro offload SRC --calibrate TEXT builds the copies once")
    device = device_named(arguments.device)
    with extra("hf"):
        from moestro.offload.session import Session
        from moestro.offload.text_model import text_model
    try:
        plan = plan_of(arguments)
    except ValueError as error:
        raise UsageError(str(error)) from error
    with Session(arguments.model, plan, device, arguments.store, None, told) as session:
        if session.low and (warning := session.low.warning()):
            told(f"moestro: warning: {warning}")
        with text_model(session) as model:
            yield model

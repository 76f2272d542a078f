"""What verbs share that run models larger than memory: the plan of a session, a model to continue texts with."""

import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from moestro.cli.arguments import Parser, UsageError, device_named, extra, opened_model, refuse, size
from moestro.cli.keeping import add_keeping

if TYPE_CHECKING:
    from moestro.generation import TextModel
    from moestro.offload.policies import Policy
    from moestro.offload.session import Plan

# options of a plan, and what they are where nobody says so
OF_PLANS: dict[str, Any] = {
    **{"exact": False, "low": "int4", "low_share": 0.25, "t1": 0.6, "t2": 0.9, "policy": [], "prefetch": 0},
    **{"hold": "files", "cooperative": False, "renormalise": False, "store": None, "calibrate": None},
}


# how threads of OpenMP wait, where others read experts
WAITING = ("OMP_WAIT_POLICY", "PASSIVE")


def add_memory(parser: Parser) -> None:
    """--memory, and what goes with it."""
    parser.add_argument(
        "--memory",
        type=size,
        metavar="SIZE",
        help="keep no more of the weights in memory: experts are brought when tokens ask for them (docs/offload.md)",
    )
    add_keeping(parser)


def spare_readers() -> None:
    """Have torch's threads sleep while they wait, unless OMP_WAIT_POLICY says otherwise: by default they spin for some
    milliseconds after every operation, on the cores that the threads need which read experts.

    The OpenMP library looks when torch loads it: before that, or it is in vain.
    """
    os.environ.setdefault(*WAITING)


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
        refuse(arguments, OF_PLANS, "{} is for models larger than memory: give --memory, too")
        opened = opened_model(arguments, arguments.model)
        from moestro.generation import TextModel

        yield TextModel(*opened)
        return
    whole = {"dtype": None, "checkpoint": "newest", "settings": []}
    refuse(arguments, whole, "{} does not go with --memory: experts are computed as they lie")
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

"""Run a mutated command line in this process, stopped before anything long, and judge its answer."""

import io
import re
import signal
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from unittest import mock

from bench.reliability.cases import Case
from bench.reliability.confined import confined
from moestro.cli import main

SECONDS, LONGEST = 60, 1500
ALLOWED = re.compile(
    r"allowed|did you mean|expected|one of|choose|must |at least|at most|above|below|need(s|ed)?\b|missing|required|"
    r"no such|not (a|an|the|in|is|set|valid|UTF-8|readable|permitted|JSON)\b|holds|is no\b|unexpected|give|multiple|"
    r"only|between|cannot|does not|do not|differs|instead|ask for|takes?\b|stands twice|anchors|tags|YAML|empty|knows|"
    r"is a mapping|no file|without --|"
    r"exactly|; --\w|ends in|reads|goes one level|asks|looks at|more than|change|larger|leaves nothing|refus|none of|"
    r"has no|is not|too |> ",
    re.IGNORECASE,
)
# mutations that are wrong whatever they meet: what is accepted of them was not noticed
ALWAYS_WRONG = frozenset({
    *("misspelled key", "extra key", "not finite", "twice", "binary", "deep", "anchors", "many digits"),
    *("misspelled option", "value for a switch"),
    *("override, no key", "override, no form", "override, below a value", "override, too far"),
})  # fmt: skip
# an option refused for another one that stands beside it
OTHER = re.compile(r"needs --|go with --|goes with --|without --|give --")
STARTED = re.compile(r"moestro: error: ")


@dataclass(frozen=True)
class Verdict:
    """`result`: accepted, refused, poor (a refusal that says too little), unnoticed (accepted, and always wrong),
    traceback, hang, or outside (it would have changed files elsewhere); why, and what was said."""

    case: Case
    result: str
    said: str
    why: str = ""


class TooLong(BaseException):
    """The time limit; nothing catches it on the way."""


class Stopped(BaseException):
    """What was asked for is right: it would go on for longer than a test wants."""


def judged(case: Case, folder: Path) -> Verdict:
    """Run a case, which may change nothing outside `folder`."""
    with confined(folder) as fence:
        verdict = _judged(case)
    if fence.crossed:
        return Verdict(case, "outside", verdict.said, f"writes {fence.crossed[0]}")
    if verdict.result == "accepted" and case.kind in ALWAYS_WRONG:
        return Verdict(case, "unnoticed", verdict.said, f"accepts {case.kind}")
    return verdict


def _judged(case: Case) -> Verdict:
    out, err = io.StringIO(), io.StringIO()
    try:
        with (
            limited(SECONDS),
            redirect_stdout(out),
            redirect_stderr(err),
            stops(),
            mock.patch("sys.stdin", io.StringIO("a")),
        ):
            code = main([case.verb, *case.words])
    except Stopped:
        return Verdict(case, "accepted", "")
    except TooLong:
        return Verdict(case, "hang", "".join(traceback.format_exc()[-1500:]))
    except SystemExit as done:
        return Verdict(case, "accepted" if done.code in (0, None) else "traceback", f"SystemExit {done.code}")
    except BaseException:
        return Verdict(case, "traceback", traceback.format_exc())
    said = err.getvalue()
    if "Traceback (most recent" in said:
        return Verdict(case, "traceback", said)
    if code == 0:
        return Verdict(case, "accepted", "")
    errors = [line for line in said.splitlines() if STARTED.match(line)]
    message = errors[-1] if errors else said
    why = lacking(case, message, len(errors), code)
    return Verdict(case, "poor" if why else "refused", message, why)


def lacking(case: Case, message: str, n_errors: int, code: int) -> str:
    """What a refusal does not say; empty where it says all it should."""
    lower = message.lower()
    checks = {
        "no line that begins with moestro: error": n_errors == 1,
        f"exit code {code}": code in (1, 2, 130),
        "does not name what is wrong": not case.names or any(name.lower() in lower for name in case.names if name),
        "does not show the value": not any(case.values)
        or OTHER.search(message)
        or any(shown(value, lower) for value in case.values),
        "does not say what is allowed": bool(ALLOWED.search(message)),
        f"longer than {LONGEST} characters": len(message) <= LONGEST,
        "control characters": message.isprintable(),
    }
    return "; ".join(what for what, right in checks.items() if not right)


def shown(value: str, message: str) -> bool:
    """Whether a message holds a value, as it was given or as it was read: one of its words, or its number; of nothing
    that it is empty."""
    words = [value, *re.findall(r"\w+", value)] if value else ["empty", "''"]
    for number in (float, int):
        with suppress(ValueError, OverflowError):
            words.append(str(number(value)))
    return any(word.lower() in message for word in words)


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises: TooLong."""

    def over(number: int, frame: FrameType | None) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def stops() -> Iterator[None]:
    """Inside, training, a comparison's runs and the server end where they would begin."""

    def stop(*arguments: object, **keywords: object) -> None:
        raise Stopped

    with ExitStack() as stack:
        for name in ("moestro.recipe.build.train", "moestro.compare.run.run_jobs", "moestro.serve.run_server"):
            stack.enter_context(mock.patch(name, stop))
        yield

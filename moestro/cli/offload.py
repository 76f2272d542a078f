"""moestro offload"""

import sys
from argparse import Namespace
from pathlib import Path
from signal import SIGTERM, default_int_handler, signal
from typing import TYPE_CHECKING, Any

from moestro.cli.arguments import Parser, UsageError, add_device, add_json, device_named, size
from moestro.cli.keeping import add_keeping
from moestro.cli.offloading import plan_of, policies_of, spare_readers, told
from moestro.cli.terminal import as_json, failed
from moestro.cli.values import positive

if TYPE_CHECKING:
    from moestro.offload.running import Generated
    from moestro.offload.session import Session
    from moestro.offload.trace import Recorder, Trace

# of choices in HIGH and LOW that a profile looks for: the paper's, on Mixtral
SHARES = (0.67, 0.30)
BENCH_PROMPT, BENCH_TOKENS = 16, 24


def add_arguments(parser: Parser) -> None:
    """What is run, replayed or profiled; memory, precisions, cache; what is generated and measured"""
    parser.add_argument(
        "what",
        nargs="+",
        type=Path,
        metavar="SRC",
        help="a run folder, or a model's folder in Hugging Face's format; or replay TRACE, or profile TRACE",
    )
    parser.add_argument("--memory", type=size, metavar="SIZE", help="fast memory for weights: 8GiB, 500MB, ...")
    add_keeping(parser)
    runs = parser.add_argument_group("generating and measuring")
    runs.add_argument("--prompt", metavar="TEXT", help="text to continue")
    runs.add_argument("--tokens", type=positive, default=64, metavar="N", help="tokens to continue by (default: 64)")
    runs.add_argument(
        "--eval",
        type=Path,
        metavar="FILE",
        help="text on which perplexity is measured, exactly and with these settings",
    )
    runs.add_argument(
        "--eval-tokens", type=positive, default=512, metavar="N", help="tokens of that text (default: 512)"
    )
    runs.add_argument("--bench", action="store_true", help="time it beside exact loading on demand")
    runs.add_argument("--trace", type=Path, metavar="FILE", help="record the routing in FILE, for replay and profile")
    runs.add_argument("--tune", action="store_true", help="with replay: find the mix of policies that reads least")
    add_json(parser)
    add_device(parser)


def run(arguments: Namespace) -> int:
    """Generate with a model larger than memory: experts are read when tokens ask for them.

    Experts that matter little to a token are read in lower precision (LOW copies, made once) or skipped; --exact reads
    all as they are. replay and profile say of a recorded trace what other memories and policies would have read.

    examples:
      moestro offload runs/hmoe-0 --memory 1GiB --prompt "Once" --exact
      moestro offload path/to/mixtral --memory 8GiB --prefetch 1 --prompt "Once" --trace routing.jsonl
      moestro offload replay routing.jsonl --memory 4GiB --policy lru --policy lfu
      moestro offload profile routing.jsonl --memory 4GiB
    """
    folder, *rest = arguments.what
    kind = str(folder)
    if kind in ("replay", "profile"):
        if len(rest) != 1:
            raise UsageError(f"moestro offload {kind} TRACE takes one trace, got {len(rest)}")
        return (_replay if kind == "replay" else _profile)(arguments, rest[0])
    if rest:
        raise UsageError(
            f"unexpected {str(rest[0])!r}: moestro offload SRC takes one folder (or replay TRACE, profile TRACE)"
        )
    if arguments.memory is None:
        raise UsageError("say how much fast memory there is: --memory 8GiB")
    if not (arguments.prompt or arguments.eval or arguments.bench):
        raise UsageError("nothing to do: give --prompt TEXT, --eval FILE or --bench")
    return _generate(arguments, folder)


def _generate(arguments: Namespace, folder: Path) -> int:
    # a run that is told to end closes its trace and its files as one that is interrupted
    signal(SIGTERM, default_int_handler)
    spare_readers()
    from moestro.offload.report import run_lines
    from moestro.offload.session import Plan, Session

    device = device_named(arguments.device)
    try:
        plan = plan_of(arguments)
    except ValueError as error:
        raise UsageError(str(error)) from error
    for text in (arguments.eval, arguments.calibrate):
        if text is not None and not text.exists():
            raise UsageError(f"no file {text}")
    calibration = None
    if arguments.calibrate and plan.low:
        with Session(folder, Plan(plan.memory), device) as session:
            print(f"calibrating on {arguments.calibrate}", file=sys.stderr)
            calibration = session.calibrate(_tokens(session, arguments.calibrate, 4096))
    with Session(folder, plan, device, arguments.store, calibration, told) as session:
        if session.low and (warning := session.low.warning()):
            print(f"moestro: warning: {warning}", file=sys.stderr)
        report, recorder = _use(arguments, session)
    if arguments.bench:
        bare = Plan(plan.memory, host=plan.host)
        with Session(folder, bare, device) as session:
            report["on_demand"] = _benched(session).as_json()
    if not as_json(arguments.json, report):
        for line in run_lines(report):
            print(line)
    if recorder is not None and recorder.error is not None:
        return failed(f"the trace is incomplete: {arguments.trace}: {recorder.error}", 1)
    return 0


def _use(arguments: Namespace, session: "Session") -> "tuple[dict[str, Any], Recorder | None]":
    """Generate and measure as asked for; the report, and who recorded the trace."""
    from contextlib import ExitStack

    from moestro.offload.report import run_report
    from moestro.offload.running import quality

    generated, measured, recorder = [], None, None
    with ExitStack() as stack:
        if arguments.trace:
            recorder = stack.enter_context(session.recording(arguments.trace))
        if arguments.prompt:
            generated.append(_continued(arguments, session))
        if arguments.bench:
            generated.append(_benched(session))
    if arguments.eval:
        measured = quality(session, _tokens(session, arguments.eval, arguments.eval_tokens))
    return run_report(session, generated, measured), recorder


def _continued(arguments: Namespace, session: "Session") -> Any:
    import torch

    from moestro.offload.running import generate

    tokenizer = session.host.tokenizer()
    ids = torch.tensor(tokenizer(arguments.prompt).input_ids)
    found = generate(session, ids, arguments.tokens, _line)
    print(file=sys.stderr)
    if arguments.json != Path("-"):
        print(arguments.prompt + tokenizer.decode(found.tokens, skip_special_tokens=True))
    return found


def _benched(session: "Session") -> "Generated":
    """A random prompt, the same for every session, continued by as many tokens whatever they are."""
    import torch

    from moestro.offload.running import generate

    vocabulary = session.model.get_input_embeddings().weight.shape[0]
    prompt = torch.randint(0, vocabulary, (BENCH_PROMPT,), generator=torch.Generator().manual_seed(0))
    found = generate(session, prompt, BENCH_TOKENS, _line, eos_token_id=None, pad_token_id=0)
    print(file=sys.stderr)
    return found


def _tokens(session: "Session", file: Path, most: int) -> Any:
    import torch

    with file.open(encoding="utf-8", errors="replace") as opened:
        ids = session.host.tokenizer()(opened.read(16 * most)).input_ids[:most]
    if len(ids) < 2:
        raise UsageError(f"{file} holds {len(ids)} tokens, at least 2 are needed")
    return torch.tensor(ids)


def _line(text: str) -> None:
    print(f"\r\x1b[K{text}" if sys.stderr.isatty() else text, end="" if sys.stderr.isatty() else "\n", file=sys.stderr)


def _read(path: Path) -> "Trace":
    from moestro.offload.trace import read_trace

    return read_trace(path)


def _replay(arguments: Namespace, path: Path) -> int:
    from rich.console import Console

    from moestro.offload.replay import Setting, budget
    from moestro.offload.report import replay_report, replay_table
    from moestro.offload.scorer import Thresholds

    trace = _read(path)
    everything = sum(map(sum, trace.header.high))
    memory = arguments.memory or everything // 4
    thresholds = Thresholds() if arguments.exact else Thresholds(arguments.t1, arguments.t2)
    try:
        capacity = budget(trace.header, memory, 0.0 if thresholds.exact else arguments.low_share)
    except ValueError as error:
        raise UsageError(f"--memory {memory:,} bytes, --low-share {arguments.low_share}: {error}") from error
    setting = Setting(capacity, thresholds=thresholds, depth=arguments.prefetch, cooperative=arguments.cooperative)
    policies = policies_of(arguments, ["lru", "lfu", "lhu", "fld", "mix", "lcu"])
    report = replay_report(trace, setting, policies, arguments.tune)
    if not as_json(arguments.json, report):
        Console(width=None if sys.stdout.isatty() else 140).print(replay_table(report))
    return 0


def _profile(arguments: Namespace, path: Path) -> int:
    from moestro.offload.report import profile_lines, profile_report

    try:
        report = profile_report(_read(path), *SHARES, arguments.memory)
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from error
    if not as_json(arguments.json, report):
        print("\n".join(profile_lines(report)))
    return 0

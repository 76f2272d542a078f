"""moestro generate"""

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moestro.cli.arguments import Parser, UsageError, add_model
from moestro.cli.offloading import add_memory, opened_text_model, spare_readers
from moestro.cli.values import positive

if TYPE_CHECKING:
    from moestro.generation import Options, TextModel

TOKENS, SHOWN = 128, 60
# A model may write what a terminal would obey; there such characters are shown as pictures of themselves.
PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
PICTURES |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def add_arguments(parser: Parser) -> None:
    """MODEL, prompts, how far and how tokens are chosen, --json"""
    add_model(parser)
    prompts = parser.add_argument_group("prompts (default: one from standard input)")
    prompts.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="text to continue; may be repeated"
    )
    prompts.add_argument(
        "--prompt-file",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="a file that is a prompt; may be repeated",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=positive,
        metavar="N",
        help=f"at most so many (default: {TOKENS}, or what the model's context leaves)",
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token (default); 1 samples"
    )
    parser.add_argument("--top-p", type=float, metavar="P", help="sample from the fewest tokens that reach P")
    parser.add_argument("--top-k", type=positive, metavar="K", help="sample from the K likeliest tokens")
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same text")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated"
    )
    parser.add_argument("--json", action="store_true", help="a line of JSON for each prompt, when its text is whole")
    add_memory(parser)


def run(arguments: Namespace) -> int:
    """Continue prompts, and print the text as it comes.

    examples:
      moestro generate runs/hmoe-0 --prompt "Once upon a time"
      echo "Once upon" | moestro generate runs/hmoe-0 --temperature 0.8 --seed 1 --max-new-tokens 50
    """
    _check_sampling(arguments)
    prompts = _prompts(arguments)
    if arguments.memory is not None:
        spare_readers()
    with opened_text_model(arguments) as text_model:
        return _continued(arguments, text_model, prompts)


def _continued(arguments: Namespace, text_model: "TextModel", prompts: Sequence[str]) -> int:
    try:
        # every prompt is checked before the first one is answered
        encoded = [text_model.encode(prompt) for prompt in prompts]
        options = [_options(arguments, text_model, ids) for ids in encoded]
    except ValueError as error:
        raise UsageError(f"{error}") from error
    for number, (prompt, ids, each) in enumerate(zip(prompts, encoded, options, strict=True), 1):
        if arguments.json:
            print(json.dumps(_written(text_model, prompt, ids, each), ensure_ascii=False), flush=True)
            continue
        if len(prompts) > 1:
            print(f"=== {number} of {len(prompts)}: {_start(prompt)}", flush=True)
        _stream(text_model, ids, each)
    return 0


def _check_sampling(arguments: Namespace) -> None:
    for name in ("top_p", "top_k", "seed"):
        if getattr(arguments, name) is not None and arguments.temperature == 0:
            option = name.replace("_", "-")
            raise UsageError(f"--{option} needs --temperature above 0: at 0 the likeliest token is always taken")


def _prompts(arguments: Namespace) -> list[str]:
    prompts = [*arguments.prompt, *(_contents(file) for file in arguments.prompt_file)]
    if not prompts and sys.stdin.isatty():
        raise UsageError("no prompt: give --prompt TEXT, --prompt-file FILE, or text on standard input")
    return prompts or [_without_last_break(sys.stdin.read())]


def _contents(file: Path) -> str:
    return _without_last_break(file.read_text(encoding="utf-8"))


def _without_last_break(text: str) -> str:
    """Editors end files with a line break that is no part of the prompt."""
    return text.removesuffix("\n")


def _options(arguments: Namespace, text_model: "TextModel", ids: Sequence[int]) -> "Options":
    from moestro.generation import Options, Sampling

    top_p = 1.0 if arguments.top_p is None else arguments.top_p
    sampling = Sampling(arguments.temperature, top_p, arguments.top_k, arguments.seed)
    return Options(text_model.room(ids, arguments.max_new_tokens, TOKENS), tuple(arguments.stop), sampling)


def _stream(text_model: "TextModel", ids: Sequence[int], options: "Options") -> None:
    pictures = PICTURES if sys.stdout.isatty() else {}
    try:
        for piece in text_model.begin(ids, options).pieces():
            print(piece.text.translate(pictures), end="", flush=True)
    finally:
        # also where Ctrl-C ends it, so that what follows stands on a line of its own
        print(flush=True)


def _written(text_model: "TextModel", prompt: str, ids: Sequence[int], options: "Options") -> dict[str, object]:
    continuation = text_model.begin(ids, options)
    text = "".join(piece.text for piece in continuation.pieces())
    counts = {"prompt_tokens": len(ids), "new_tokens": len(continuation.new_tokens)}
    return {"prompt": prompt, "text": text, "reason": continuation.reason, **counts}


def _start(prompt: str) -> str:
    line = " ".join(prompt.split())
    return line if len(line) <= SHOWN else line[: SHOWN - 3] + "..."

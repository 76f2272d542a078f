"""One contestant of `bench.offload`, in a process of its own under a limit: loads, continues a prompt, prints JSON."""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.limits import enter, read_from_disk
from moestro.cli.offload import SHARES

PROMPT = 8


class Clock:
    """When each token came and what the disk had been asked for by then; also a streamer for transformers."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, int]] = []

    def mark(self, *said: object) -> None:
        """Now: before the prompt, then after each token."""
        self.marks.append((time.perf_counter(), read_from_disk()))

    # the prompt is put when its pass begins
    put = mark

    def end(self) -> None: ...

    def found(self) -> dict[str, float]:
        """Seconds and bytes from the disk: of the prompt's pass, which gives the first token, and of each one after."""
        (start, before), (first, between), *_, (last, after) = self.marks
        tokens = len(self.marks) - 2
        return {
            "prefill": first - start,
            "prefill_disk": between - before,
            "seconds": (last - first) / tokens,
            "disk": (after - between) / tokens,
        }


def prompt(vocabulary: int, seed: int = 0) -> torch.Tensor:
    """The same random tokens for every side."""
    return torch.randint(0, vocabulary, (1, PROMPT), generator=torch.Generator().manual_seed(seed))


def accelerated(folder: Path, memory: int, tokens: int) -> dict[str, Any]:
    """transformers with accelerate's offloading to disk."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory(dir=folder.parent) as offloaded:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto",
            device_map="auto",
            max_memory={"cpu": memory},
            offload_folder=offloaded,
            experts_implementation="eager",
        ).eval()
        away = sum(p.numel() * p.element_size() for p in model.parameters() if p.is_meta)
        clock, ids = Clock(), prompt(model.config.vocab_size)
        out = model.generate(
            ids, max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0, streamer=clock
        )
        return {"tokens": out[0, PROMPT:].tolist(), "away": away, **clock.found()}


def profiled(folder: Path, memory: int, tokens: int) -> dict[str, Any]:
    """What `moestro offload profile --memory` says of a text that is not the measured one, as options of `ours`."""
    from moestro.offload.codecs import CODECS
    from moestro.offload.report import profile_report
    from moestro.offload.running import generate
    from moestro.offload.session import Plan, Session
    from moestro.offload.trace import read_trace

    with Session(folder, Plan(memory, CODECS["int4"])) as session:
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            path = Path(temporary) / "trace.jsonl"
            with session.recording(path):
                ids = prompt(session.model.config.vocab_size, 1)
                generate(session, ids[0], tokens, eos_token_id=None, pad_token_id=0)
            report = profile_report(read_trace(path), *SHARES, sum(session.capacity.values()))
    thresholds = report["thresholds"]
    return {"t1": thresholds["high"], "t2": thresholds["low"], "low_share": report["low_share"], **report["shares"]}


def ours(folder: Path, memory: int, tokens: int, mixed: dict[str, float]) -> dict[str, Any]:
    """moestro offload, exact or, with thresholds and a share, with LOW copies."""
    from moestro.offload.codecs import CODECS
    from moestro.offload.running import generate
    from moestro.offload.scorer import Thresholds
    from moestro.offload.session import Plan, Session

    thresholds = Thresholds(mixed["t1"], mixed["t2"]) if mixed else Thresholds()
    plan = Plan(memory, CODECS["int4"], mixed["low_share"], thresholds) if mixed else Plan(memory)
    with Session(folder, plan) as session:
        clock, ids = Clock(), prompt(session.model.config.vocab_size)
        clock.mark()
        found = generate(session, ids[0], tokens, clock.mark, eos_token_id=None, pad_token_id=0)
        rates = found.decode.rates()
        asked = found.decode.moved / (len(found.tokens) - 1)
        return {"tokens": found.tokens.tolist(), "moved": asked, "hit_rate": rates["hit_rate"], **clock.found()}


def copies(folder: Path) -> None:
    """LOW copies beside the folder. Numbers that were drawn at random need no search for the best codes."""
    from moestro.formats import Checkpoint
    from moestro.offload.codecs import Grouped
    from moestro.offload.folders import experts_in
    from moestro.offload.store import open_store

    codec = Grouped("int4", 4, searched=False)
    open_store(folder.with_name(f"{folder.name}.offload-int4"), experts_in(Checkpoint(folder)), codec)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=("accelerate", "exact", "mixed", "store", "profile"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--memory", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--plan", type=json.loads, default={}, help="what the side profile found")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    limit = enter()
    if options.side == "store":
        copies(options.folder)
        found = {}
    elif options.side == "accelerate":
        found = accelerated(options.folder, options.memory, options.tokens)
    elif options.side == "profile":
        found = profiled(options.folder, options.memory, options.tokens)
    else:
        found = ours(options.folder, options.memory, options.tokens, options.plan if options.side == "mixed" else {})
    print(json.dumps({"limit": limit, **found}))


if __name__ == "__main__":
    main()

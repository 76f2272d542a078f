"""One contestant of `bench.offload`, in a process of its own under a limit: loads, continues a prompt, prints JSON."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from bench.limits import enter, read_from_disk

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


def prompt(vocabulary: int) -> torch.Tensor:
    """The same random tokens for every side."""
    return torch.randint(0, vocabulary, (1, PROMPT), generator=torch.Generator().manual_seed(0))


def accelerated(folder: Path, memory: int, tokens: int) -> dict[str, Any]:
    """transformers with accelerate's offloading to disk."""
    import tempfile

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


def ours(folder: Path, memory: int, tokens: int, low: str | None) -> dict[str, Any]:
    """moestro offload, exact or with LOW copies."""
    from moestro.offload.codecs import codec_named
    from moestro.offload.running import generate
    from moestro.offload.scorer import Thresholds
    from moestro.offload.session import Plan, Session

    plan = Plan(memory, codec_named(low), 0.4, Thresholds(0.6, 0.9)) if low else Plan(memory)
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
    parser.add_argument("side", choices=("accelerate", "exact", "mixed", "store"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--memory", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    limit = enter()
    if options.side == "store":
        copies(options.folder)
        found = {}
    elif options.side == "accelerate":
        found = accelerated(options.folder, options.memory, options.tokens)
    else:
        found = ours(options.folder, options.memory, options.tokens, "int4" if options.side == "mixed" else None)
    print(json.dumps({"limit": limit, **found}))


if __name__ == "__main__":
    main()

"""One contestant of `bench.offload`, in a process of its own under a limit: loads, continues a prompt, prints JSON."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from bench.limits import enter

PROMPT = 8


class Clock:
    """A streamer that notes when each new token comes."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None: ...


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
        return _found(out, clock, float(away))


def ours(folder: Path, memory: int, tokens: int, low: str | None) -> dict[str, Any]:
    """moestro offload, exact or with LOW copies."""
    from moestro.offload.codecs import codec_named
    from moestro.offload.running import generate
    from moestro.offload.scorer import Thresholds
    from moestro.offload.session import Plan, Session

    plan = Plan(memory, codec_named(low), 0.4, Thresholds(0.6, 0.9)) if low else Plan(memory)
    with Session(folder, plan) as session:
        ids = prompt(session.model.config.vocab_size)
        found = generate(session, ids[0], tokens, eos_token_id=None, pad_token_id=0)
        after = len(found.tokens) - 1
        rates = found.decode.rates()
        return {
            "tokens": found.tokens.tolist(),
            "seconds": found.decode_seconds / after,
            "prefill": found.prefill_seconds,
            "bytes": found.decode.moved / after,
            "hit_rate": rates["hit_rate"],
        }


def _found(out: torch.Tensor, clock: Clock, each: float) -> dict[str, Any]:
    # the streamer is given the prompt first; times[1] is the first new token
    seconds = (clock.times[-1] - clock.times[1]) / (len(clock.times) - 2)
    prefill = clock.times[1] - clock.times[0]
    return {"tokens": out[0, PROMPT:].tolist(), "seconds": seconds, "prefill": prefill, "bytes": each}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=("accelerate", "exact", "mixed", "store"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--memory", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.side == "store":
        from moestro.formats import Checkpoint
        from moestro.offload.codecs import CODECS
        from moestro.offload.folders import experts_in
        from moestro.offload.store import open_store

        folder = options.folder
        open_store(folder.with_name(f"{folder.name}.offload-int4"), experts_in(Checkpoint(folder)), CODECS["int4"])
        print(json.dumps({"limit": "none"}))
        return
    limit = enter()
    if options.side == "accelerate":
        found = accelerated(options.folder, options.memory, options.tokens)
    else:
        found = ours(options.folder, options.memory, options.tokens, "int4" if options.side == "mixed" else None)
    print(json.dumps({"limit": limit, **found}))


if __name__ == "__main__":
    main()

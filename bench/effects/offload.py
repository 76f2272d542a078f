"""Directions that HOBBIT reports (arXiv:2411.01433), on traces and texts of models trained here.

python -m bench.effects.offload [--quick] [--json PATH]: Mixtral-class models over bytes of the standard library's own
source, and HMoE beside MoE; 256 held-out tokens a sequence, one at a time as in generation."""

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown
from torch import Tensor

from bench.effects.effect import Effect
from bench.effects.table import effect_lines
from bench.harness import ROOT, commit, machine
from bench.small_mixtral import library_text, trained
from moestro.offload.codecs import CODECS, Codec
from moestro.offload.policies import SINGLE
from moestro.offload.replay import Setting, replay
from moestro.offload.routing_traces import trace_of
from moestro.offload.running import decoded_perplexity
from moestro.offload.scorer import Precision, Thresholds
from moestro.offload.session import Plan, Session
from moestro.offload.trace import Trace, read_trace
from moestro.offload.tuning import prediction_accuracy, tune_mix
from moestro.recipe.build import run_training
from moestro.recipe.evaluation import opened_run
from moestro.recipe.load import load_recipe
from moestro.train.durable import write_json

SEEDS = (0, 1, 2)
CORPUS = "standard library"
EFFECTS = (
    Effect("A", "predictions fall with distance", "3.3", "first expert predicted, 1 less 2 layers ahead", ("small",),
           lambda run: run["chosen"][0] - run["chosen"][1], low=0.0),
    Effect("B", "the tuned mix beats every single policy on its trace", "3.4", "penalty over the best single one's",
           ("small",), lambda run: run["mix"] / min(run["single"].values()), high=1.0),
    Effect("C", "records of a sequence beat records of the model", "3.4", "LFU hit rate, sequence less model",
           ("small",), lambda run: run["lfu"]["sequence"] - run["lfu"]["model"], low=0.0),
    Effect("D", "skipping costs more than replacing by int4", "2", "nats, skipped less replaced, T1 0.6", ("small",),
           lambda run: run["nats"]["skip 0.6"] - run["nats"]["int4 0.6"], low=0.0),
    Effect("E", "the more is skipped the more it costs", "2", "nats, T1 0.3 less 0.6", ("small",),
           lambda run: run["nats"]["skip 0.3"] - run["nats"]["skip 0.6"], low=0.0),
    Effect("F", "mixed precision costs at most 1 %", "4", "perplexity, T1 0.6, T2 0.9, int4, over exact", ("small",),
           lambda run: math.exp(run["nats"]["mixed"] - run["nats"]["exact"]), high=1.01),
    Effect("G", "narrow experts are a low tier of their own", "ours", "bytes a token, HMoE over MoE, a quarter cached",
           ("hmoe", "moe"), lambda unequal, equal: unequal["bytes"] / equal["bytes"], high=1.0),
)  # fmt: skip


def small(folder: Path, seed: int, steps: int, tokens: int) -> dict[str, Any]:
    """Everything of one Mixtral-class model."""
    path, held_out = trained(folder / f"small-{seed}", seed, steps)
    text, window = held_out[:tokens], min(256, tokens // 2)
    with Session(path, Plan(1 << 40)) as session:
        calibration = session.calibrate(held_out[-2048:])
        with session.recording(folder / f"{seed}.jsonl"):
            exact = decoded_perplexity(session, text, window)
        least = session.resident + 3 * session.memory.size((0, 0), Precision.HIGH)
    nats = {"exact": math.log(exact)}
    plans: dict[str, tuple[Thresholds, Codec | None]] = {
        "skip 0.6": (Thresholds(0.6, 0.6), None),
        "skip 0.3": (Thresholds(0.3, 0.3), None),
        "int4 0.6": (Thresholds(0.6, 1.0), CODECS["int4"]),
        "mixed": (Thresholds(0.6, 0.9), CODECS["int4"]),
    }
    for name, (thresholds, codec) in plans.items():
        plan = Plan(least, codec, 0.3, thresholds)
        with Session(path, plan, store=folder / f"low-{seed}", calibration=calibration if codec else None) as session:
            nats[name] = math.log(decoded_perplexity(session, text, window))
    return {"nats": nats, **replayed(read_trace(folder / f"{seed}.jsonl"))}


def replayed(trace: Trace) -> dict[str, Any]:
    """What the trace alone says: predictions, penalties with an eighth of the experts cached, levels of records."""
    everything = sum(map(sum, trace.header.high))
    capacity = {Precision.HIGH: everything // 8, Precision.LOW: everything // 32}
    setting = Setting(capacity, thresholds=Thresholds(0.6, 0.9))
    single = {n: replay(trace, Setting(setting.capacity, p, setting.thresholds)).penalty for n, p in SINGLE.items()}
    rates = {}
    for level in ("sequence", "model"):
        counts = replay(trace, Setting(setting.capacity, SINGLE["lfu"], per_sequence=level == "sequence")).counts
        rates[level] = counts.hits / counts.requests
    chosen = [row["chosen"] for row in prediction_accuracy(trace)]
    return {"chosen": chosen, "single": single, "mix": tune_mix(trace, setting)[1], "lfu": rates}


def own(folder: Path, name: str, seed: int, steps: int, text: Path, tokens: Tensor) -> dict[str, Any]:
    """Bytes a token of one of our models, a quarter of its experts' bytes cached."""
    settings = [f"data.source={{kind: text, paths: {text}, split: blank-line}}", "data.tokenizer={kind: bytes}"]
    settings += [
        f"train.budget.steps={steps}",
        f"train.seed={seed}",
        "train.tensorboard=false",
        "train.eval_tokens=2048",
    ]
    run = folder / f"{name}-{seed}"
    run_training(load_recipe(ROOT / "recipes" / f"{name}.yaml", settings), run, show_preparation=False)
    trace = trace_of(opened_run(run).model, tokens, folder / f"{name}-{seed}.jsonl")
    quarter = sum(map(sum, trace.header.high)) // 4
    counts = replay(trace, Setting({Precision.HIGH: quarter}, SINGLE["lfu"])).counts
    return {"bytes": counts.moved / counts.passes, "hit_rate": counts.hits / counts.requests}


def measured(seeds: tuple[int, ...], steps: int, tokens: int) -> dict[str, Any]:
    """All runs of all seeds, and a row for every effect."""
    runs: dict[int, dict[str, dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="moestro-effects-") as temporary:
        folder, text = Path(temporary), library_text()
        file = folder / "text.txt"
        file.write_bytes(bytes(text[: 1 << 21].tolist()))
        sample = text[-4 * 64 :].view(4, 64)
        for seed in seeds:
            runs[seed] = {"small": small(folder, seed, steps, tokens)}
            runs[seed] |= {name: own(folder, name, seed, steps, file, sample) for name in ("hmoe", "moe")}
    rows = [effect.row(CORPUS, runs) for effect in EFFECTS]
    facts = {"script": "bench/effects/offload.py", "commit": commit(), "machine": machine(1), "seeds": list(seeds)}
    return {**facts, "steps": steps, "held_out_tokens": tokens, "rows": rows, "runs": json.loads(json.dumps(runs))}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed, a few steps: shows that it works, no effect")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results as JSON")
    options = parser.parse_args()
    found = measured(SEEDS[:1], 8, 32) if options.quick else measured(SEEDS, 600, 512)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.json, found)
    Console(width=None if sys.stdout.isatty() else 200).print(Markdown("\n".join(effect_lines(found))))


if __name__ == "__main__":
    main()

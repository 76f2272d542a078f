"""What the study of offloading asks of a trained run: texts decoded token by token, and its trace replayed."""

import math
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from bench.effects.study import Trained
from moestro.offload.codecs import CODECS, Codec
from moestro.offload.policies import SINGLE
from moestro.offload.replay import Setting, replay
from moestro.offload.running import decoded_perplexity
from moestro.offload.scorer import Precision, Thresholds
from moestro.offload.session import Plan, Session
from moestro.offload.trace import Trace, read_trace
from moestro.offload.tuning import prediction_accuracy, tune_mix

CALIBRATION, DECODED, WINDOW = 2048, 512, 128
PLANS: dict[str, tuple[Thresholds, Codec | None]] = {
    "skip 0.6": (Thresholds(0.6, 0.6), None),
    "skip 0.3": (Thresholds(0.3, 0.3), None),
    "int4 0.6": (Thresholds(0.6, 1.0), CODECS["int4"]),
    "int2 0.6": (Thresholds(0.6, 1.0), CODECS["int2"]),
    "mixed": (Thresholds(0.6, 0.9), CODECS["int4"]),
}


def offloading(trained: Trained) -> dict[str, Any]:
    """The loss a token under every plan, "nats", each token decoded after those before it; and what the exact run's
    trace says (`replayed`)."""
    few = trained.final_tokens < 4 * DECODED
    held_out = text(trained, DECODED // 8 if few else DECODED)
    with tempfile.TemporaryDirectory(prefix="moestro-effects-") as temporary:
        folder = Path(temporary)
        with Session(trained.folder, Plan(1 << 40)) as session:
            calibration = session.calibrate(trained_on(trained, CALIBRATION))
            with session.recording(folder / "trace.jsonl", depth=3):
                nats = {"exact": math.log(decoded_perplexity(session, held_out, WINDOW))}
            largest = max(stored.blob.size for layer in session.host.experts for stored in layer)
            memory = session.resident + 6 * largest
        for name, (thresholds, low) in PLANS.items():
            plan = Plan(memory, low, 0.3, thresholds)
            store = folder / f"low-{low.name}" if low else None
            with Session(trained.folder, plan, store=store, calibration=calibration if low else None) as session:
                nats[name] = math.log(decoded_perplexity(session, held_out, WINDOW))
        return {"nats": nats, **replayed(read_trace(folder / "trace.jsonl"))}


def text(trained: Trained, tokens: int) -> Tensor:
    """The first windows of held-out text [n]."""
    return next(iter(trained.held_out(tokens))).tokens.flatten()[:tokens]


def trained_on(trained: Trained, tokens: int) -> Tensor:
    """Training text [n], in an order of its own."""
    size = trained.recipe.train.value("batch_size")
    return trained.dataset.train_batch(0, size, seed=10**6).tokens.flatten()[:tokens]


def replayed(trace: Trace) -> dict[str, Any]:
    """What a trace alone says: predictions by distance; penalties with an eighth of the experts' bytes for HIGH copies
    and a 32nd for LOW ones; LFU hit rates by level of its records; bytes a token with a quarter cached."""
    everything = sum(map(sum, trace.header.high))
    largest = max(map(max, trace.header.high))
    capacity = {Precision.HIGH: max(everything // 8, largest), Precision.LOW: everything // 32}
    setting = Setting(capacity, thresholds=Thresholds(0.6, 0.9))
    single = {n: replay(trace, Setting(setting.capacity, p, setting.thresholds)).penalty for n, p in SINGLE.items()}
    rates = {}
    for level in ("sequence", "model"):
        counts = replay(trace, Setting(setting.capacity, SINGLE["lfu"], per_sequence=level == "sequence")).counts
        rates[level] = counts.hits / counts.requests
    quarter = replay(trace, Setting({Precision.HIGH: everything // 4}, SINGLE["lfu"])).counts
    return {
        "chosen": [row["chosen"] for row in prediction_accuracy(trace)],
        "single": single,
        "mix": tune_mix(trace, setting)[1],
        "lfu": rates,
        "bytes": quarter.moved / quarter.passes,
    }

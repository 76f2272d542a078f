"""One run of a comparison, in a process of its own: train, then measure."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moestro.data import Dataset
from moestro.evaluate import evaluate, routing_report, token_sample
from moestro.recipe.build import build_data, build_model, run_training
from moestro.recipe.load import load_recipe
from moestro.train.durable import write_json
from moestro.train.weights import load_weights, newest_checkpoint

SUMMARY = "summary.json"
SAMPLE_CHARACTERS = 700


@dataclass(frozen=True)
class Job:
    """One run: which arm, size, budget and seed, its recipe, and where it lives."""

    arm: str
    size: str
    budget: float
    seed: int
    recipe: Path
    settings: tuple[str, ...]
    folder: Path
    expected_token_flops: float
    threads: int
    final_tokens: int | None
    sample: bool

    @property
    def name(self) -> str:
        return f"{self.arm} {self.size} seed {self.seed}"

    @property
    def summary(self) -> dict[str, Any] | None:
        """What the finished run measured; None until then."""
        file = self.folder / SUMMARY
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def progress(self) -> float:
        """Share of the budget used so far, read from the run's own metrics."""
        if (self.folder / SUMMARY).exists():
            return 1.0
        return min(1.0, last_flops(self.folder / "metrics.jsonl") / self.budget)


def last_flops(metrics: Path) -> float:
    """Cumulative FLOPs of the last complete step line; 0 where there is none."""
    if not metrics.exists():
        return 0.0
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - 4096))
        lines = file.read().split(b"\n")[:-1]
    for line in reversed(lines):
        if line.startswith(b"{") and b'"flops"' in line:
            return float(json.loads(line)["flops"])
    return 0.0


def run_job(job: Job) -> dict[str, Any]:
    """Train the run to its end, from its last checkpoint where it has one, and measure it; returns the summary."""
    torch.set_num_threads(job.threads)
    if job.summary is not None:
        return job.summary
    recipe = load_recipe(job.recipe, job.settings)
    result = run_training(recipe, job.folder, show_preparation=False)
    summary = {**result, **measure(job), "finished": time.time()}
    write_json(job.folder / SUMMARY, summary)
    return summary


def measure(job: Job) -> dict[str, Any]:
    """Final figures on held-out text, use of the experts and, where asked for, the coloured text."""
    recipe = load_recipe(job.recipe, job.settings)
    dataset = build_data(recipe).prepare(progress=False)
    model = build_model(recipe, dataset.vocab_size)
    load_weights(model, newest_checkpoint(job.folder))
    batch = recipe.train.value("batch_size")

    def held_out():
        return dataset.val_batches(batch, job.final_tokens)

    return {
        "params_total": sum(p.numel() for p in model.parameters()),
        "final": evaluate(model, held_out()),
        "routing": routing_report(model, held_out()),
        "sample": token_sample(model, dataset.tokenizer, sample_text(dataset)) if job.sample else None,
    }


def sample_text(dataset: Dataset) -> str:
    """The beginning of the first held-out document that is long enough to be worth reading, cut at a line's end."""
    for number in range(dataset.n_val_documents):
        text = dataset.val_document(number)
        if len(text) >= SAMPLE_CHARACTERS:
            break
    text = text[:SAMPLE_CHARACTERS]
    return text[: text.rfind("\n") + 1] or text

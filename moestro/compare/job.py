"""One run of a comparison, in a process of its own: train, then measure."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moestro.compare.plan import budget_name
from moestro.evaluate import evaluate, routing_report, sample_text, token_sample
from moestro.model.active import total_parameters
from moestro.recipe.build import build_data, build_model, first_difference, run_training
from moestro.recipe.load import load_recipe
from moestro.recipe.syntax import RecipeError
from moestro.train.durable import write_json
from moestro.train.environment import source_commit
from moestro.train.weights import load_weights, newest_checkpoint

SUMMARY = "summary.json"


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
    device: str = "cpu"

    @property
    def name(self) -> str:
        return f"{self.arm} {self.size} {budget_name(self.budget)} seed {self.seed}"

    @property
    def summary(self) -> dict[str, Any] | None:
        """What the finished run measured; None until then."""
        file = self.folder / SUMMARY
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    @property
    def question(self) -> dict[str, Any]:
        """All that decides the summary: the recipe with every setting, and what is measured of it."""
        tree = load_recipe(self.recipe, self.settings).tree
        return json.loads(json.dumps({"recipe": tree, "final_tokens": self.final_tokens, "sample": self.sample}))

    def train(self) -> dict[str, Any]:
        """The run to its end, from its last checkpoint where it has one; returns the final metrics."""
        return run_training(load_recipe(self.recipe, self.settings), self.folder, self.device, show_preparation=False)

    def measure(self) -> dict[str, Any]:
        """Final figures on held-out text, use of the experts and, where asked for, the coloured text."""
        recipe = load_recipe(self.recipe, self.settings)
        dataset = build_data(recipe).prepare(progress=False)
        model = build_model(recipe, dataset.vocab_size, self.device)
        load_weights(model, newest_checkpoint(self.folder))
        batch = recipe.train.value("batch_size") // recipe.train.value("accumulate")
        precision = recipe.train.value("precision")

        def held_out():
            return dataset.val_batches(batch, self.final_tokens)

        return {
            "params_total": total_parameters(model),
            "final": evaluate(model, held_out(), precision=precision),
            "routing": routing_report(model, held_out(), precision=precision),
            "sample": token_sample(model, dataset.tokenizer, sample_text(dataset), precision=precision)
            if self.sample
            else None,
        }

    def check_same(self) -> None:
        """Raises: RecipeError where the folder holds a finished run of other settings."""
        summary = self.summary
        if summary is not None and (found := first_difference(summary["question"], self.question)):
            name, old, new = found
            raise RecipeError(
                f"{self.folder} holds a finished run of another comparison: {name} was {old}, now {new}. "
                "Choose another folder (--out), or delete that one"
            )

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
    # asked before the run: its recipe's file may be edited while it goes on
    question = job.question
    result = job.train()
    facts = {"question": question, "commit": source_commit(), "finished": time.time()}
    summary = {**result, **job.measure(), **facts}
    write_json(job.folder / SUMMARY, summary)
    return summary

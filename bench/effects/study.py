"""A study: named arms (a recipe and keys set in it), trained at equal useful FLOPs over seeds and corpora.

Runs live in a work folder: killed at any moment and started again, a study continues where it was (moestro.compare).
After training, each run is probed: its model is asked whatever the study's effects are made of.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from bench.effects.corpora import PAGES, QUICK, corpus_settings
from bench.harness import ROOT
from moestro.compare.board import Board
from moestro.compare.job import Job
from moestro.compare.match import training_flops
from moestro.compare.plan import flat
from moestro.compare.run import run_jobs
from moestro.data import Dataset
from moestro.evaluate import evaluate
from moestro.model import Transformer
from moestro.recipe.build import build_data, build_model
from moestro.recipe.load import Recipe, load_recipe
from moestro.train.checkpoint import list_checkpoints, step_of
from moestro.train.weights import load_weights


@dataclass(frozen=True)
class Arm:
    """A recipe file below recipes/, and the keys set in it after the study's common ones. An arm with `start` goes on
    from the weights of that arm's run (same corpus, same seed, its tokenizer). One with `text` is trained on that one
    instead of the study's corpus. `probes` are asked besides the study's."""

    recipe: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    start: str | None = None
    text: str | None = None
    probes: "Mapping[str, Probe]" = field(default_factory=dict)


@dataclass(frozen=True)
class Trained:
    """A finished run, as a probe sees it."""

    recipe: Recipe
    dataset: Dataset
    folder: Path
    final_tokens: int

    def checkpoints(self) -> dict[int, Path]:
        """The saved states by their step, the last one last."""
        return {step_of(path): path for path in list_checkpoints(self.folder / "checkpoints")}

    def model(self, step: int | None = None) -> Transformer:
        """The model after `step` optimizer steps, one of `checkpoints()`; 0 is what it started with, None the last."""
        model = build_model(self.recipe, self.dataset.vocab_size, from_start=step == 0)
        if step != 0:
            saved = self.checkpoints()
            load_weights(model, saved[max(saved) if step is None else step])
        return model.eval()

    def held_out(self, tokens: int | None = None) -> Iterator[Any]:
        """Held-out batches of about so many tokens; by default as many as the final figures are of."""
        return self.dataset.val_batches(self.recipe.train.value("batch_size"), tokens or self.final_tokens)


# A decoder that trains in half a minute on one core: what studies of mixture layers have in common.
SMALL: Mapping[str, Any] = {
    "data.tokenizer": {"kind": "bpe", "vocab_size": 512},
    "model.d_model": 64,
    "model.n_layers": 3,
    "train.batch_size": 8,
    "optim.lr": 0.01,
}
# Asked of a finished run: of its `Trained`; in studies of conversions, of its job.
Probe = Callable[[Any], Any]


@dataclass(frozen=True)
class ProbedJob(Job):
    """A run whose summary holds the loss on held-out text and the answer of every probe, by name."""

    probes: tuple[tuple[str, Probe], ...] = ()

    @property
    def question(self) -> dict[str, Any]:
        return {**super().question, "probes": [name for name, _ in self.probes]}

    def measure(self) -> dict[str, Any]:
        recipe = load_recipe(self.recipe, self.settings)
        dataset = build_data(recipe).prepare(progress=False)
        trained = Trained(recipe, dataset, self.folder, self.final_tokens or dataset.n_val_tokens)
        final = evaluate(trained.model(), trained.held_out(), precision=recipe.train.value("precision"))
        return {"final": final, **{name: probe(trained) for name, probe in self.probes}}


@dataclass(frozen=True)
class Study:
    """What is trained. `budget` are useful training FLOPs, the same for every run; `common` keys are set in every arm
    before the arm's own; `checkpoints` states of each run are kept for the probes."""

    name: str
    arms: Mapping[str, Arm]
    budget: float
    common: Mapping[str, Any]
    probes: Mapping[str, Probe] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)
    corpora: tuple[str, ...] = ("wikitext-2", "redpajama")
    checkpoints: int = 8
    final_tokens: int = 131_072

    def quick(self) -> "Study":
        """The same arms for a few steps each on text that every checkout has: shows that it works, and no effect."""
        arms = {name: replace(arm, text=arm.text and QUICK.get(arm.text, PAGES)) for name, arm in self.arms.items()}
        return replace(self, budget=self.budget / 200, seeds=(0, 1), corpora=(PAGES,), final_tokens=2048, arms=arms)


@dataclass(frozen=True)
class Work:
    """A study in its work folder, with the corpora below `data`."""

    study: Study
    folder: Path
    data: Path

    @cached_property
    def datasets(self) -> dict[str, Dataset]:
        """The corpora, prepared for training."""
        arm = next(iter(self.study.arms))
        return {
            corpus: build_data(self.recipe(corpus, arm, {})).prepare(progress=True) for corpus in self.study.corpora
        }

    def settings(self, corpus: str, arm: str, more: Mapping[str, Any]) -> tuple[str, ...]:
        """Everything set in the arm's recipe, as `key=value`."""
        plan = self.study.arms[arm]
        text = corpus_settings(plan.text or corpus, self.data)
        start = self._start(corpus, plan.start, more.get("train.seed", 0)) if plan.start else {}
        keys = {**self.study.common, **start, **text, **flat(plan.settings), **more}
        return tuple(f"{key}={json.dumps(value)}" for key, value in keys.items())

    def _start(self, corpus: str, arm: str, seed: int) -> dict[str, Any]:
        """What an arm says that goes on from another's run; a corpus that brings a tokenizer says it again after."""
        folder = self.run(corpus, arm, seed)
        return {"adapt.start": str(folder), "data.tokenizer": {"kind": "file", "path": str(folder / "tokenizer")}}

    def run(self, corpus: str, arm: str, seed: int) -> Path:
        """The folder of a run."""
        return self.folder.absolute() / corpus / arm / f"seed{seed}"

    def recipe(self, corpus: str, arm: str, more: Mapping[str, Any]) -> Recipe:
        """The recipe of one arm on one corpus."""
        return load_recipe(ROOT / "recipes" / self.study.arms[arm].recipe, self.settings(corpus, arm, more))

    @cached_property
    def jobs(self) -> list[ProbedJob]:
        """Every run, seed by seed, so that an early stop leaves whole comparisons behind."""
        study = self.study
        cells = [(seed, corpus, arm) for seed in study.seeds for corpus in study.corpora for arm in study.arms]
        return [self._job(seed, corpus, arm) for seed, corpus, arm in cells]

    def _job(self, seed: int, corpus: str, arm: str) -> ProbedJob:
        study = self.study
        plain = self.recipe(corpus, arm, {})
        flops = training_flops(plain, self.datasets[corpus].vocab_size)
        step = flops * plain.train.value("batch_size") * plain.data.value("seq_len")
        training = {
            "train.seed": seed,
            "train.budget.flops": study.budget,
            "train.save_every": max(1, round(study.budget / step / study.checkpoints)),
            "train.keep_last": 10_000,
            "train.keep_best": False,
            "train.eval_every": 0,
            "train.eval_tokens": 2048,
            "train.tensorboard": False,
        }
        return ProbedJob(
            arm=arm,
            size=corpus,
            budget=study.budget,
            seed=seed,
            recipe=ROOT / "recipes" / study.arms[arm].recipe,
            settings=self.settings(corpus, arm, training),
            folder=self.run(corpus, arm, seed),
            expected_token_flops=flops,
            threads=1,
            final_tokens=study.final_tokens,
            sample=False,
            probes=(*study.probes.items(), *study.arms[arm].probes.items()),
        )

    def train(self, workers: int, board: Board | None = None) -> None:
        """Train and probe every run that is not finished, `workers` at a time.

        Raises: RuntimeError naming the runs that failed; RecipeError where the folder holds runs of another study.
        """
        board, failures = board or Board(), {}
        for job in self.jobs:
            job.check_same()
        study = self.study
        board.start(
            self.jobs,
            f"{len(study.arms)} arms ({', '.join(study.arms)}), corpora {', '.join(study.corpora)}, seeds "
            f"{', '.join(map(str, study.seeds))}, {study.budget:.3g} useful training FLOPs each",
        )
        # those that others start from first
        for later in (False, True):
            run_jobs([job for job in self.jobs if bool(study.arms[job.arm].start) is later], workers, board, failures)
        if failures:
            raise RuntimeError(f"{len(failures)} runs failed: " + "; ".join(f"{k}: {v}" for k, v in failures.items()))

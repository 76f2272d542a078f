"""Studies of converted models: each arm begins with the weights of one dense run, turned into a mixture or not."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bench.effects.stories import model_settings, read_model, write_tokenizer
from bench.effects.study import Probe, Work
from bench.harness import ROOT
from moestro.compare.board import Board
from moestro.compare.job import Job
from moestro.compare.match import training_flops
from moestro.compare.run import run_jobs
from moestro.convert.plan import load_conversion
from moestro.convert.run import REPORT, convert_run, write_run
from moestro.data import Dataset
from moestro.evaluate import evaluate
from moestro.recipe.build import build_data, build_model, run_training
from moestro.recipe.evaluation import opened_run
from moestro.recipe.load import Recipe, load_recipe
from moestro.train.checkpoint import list_checkpoints

# The corpus whose dense model is a public pretrained one.
PRETRAINED = "tinystories"
# How the text of the pretrained model is read: few tokens a step, so that all arms stop near the same budget.
READING = {"data.seq_len": 256, "data.val_fraction": 0.3, "train.batch_size": 2}
DENSE = "dense"
# Useful training FLOPs of the dense models trained here, times a study's budget.
SOURCE_BUDGETS = 2.0


@dataclass(frozen=True)
class ConvertedJob(Job):
    """A run that begins with a dense run's weights, converted as `conversion` says (None: as they are), and goes on for
    the budget."""

    source: Path = Path()
    conversion: tuple[str, ...] | None = None
    probes: tuple[tuple[str, Probe], ...] = ()

    @property
    def question(self) -> dict[str, Any]:
        probes = {"probes": [name for name, _ in self.probes]} if self.probes else {}
        return {
            **super().question,
            "conversion": None if self.conversion is None else list(self.conversion),
            **probes,
        }

    def train(self) -> dict[str, Any]:
        if not list_checkpoints(self.folder / "checkpoints"):
            # a conversion that was killed leaves no checkpoint behind
            shutil.rmtree(self.folder, ignore_errors=True)
            self.begin()
        return run_training(load_recipe(self.folder / "recipe.yaml"), self.folder, show_preparation=False)

    def begin(self) -> None:
        """Write the run's step 0."""
        if self.conversion is not None:
            changes = [f"run.{setting}" for setting in self.settings]
            conversion = load_conversion(None, [*self.conversion, f"seed={self.seed}", *changes])
            convert_run(self.source, self.folder, conversion, held_out=self.final_tokens or 2048)
            return
        run, recipe = opened_run(self.source), load_recipe(self.recipe, self.settings)
        held_out = run.dataset.val_batches(run.batch_size, self.final_tokens)
        loss = evaluate(run.model, held_out, precision=run.precision)["loss"]
        report = {"loss": {"dense": loss, "converted": loss}, "layers": []}
        write_run(self.folder, recipe, run.model, run.dataset, lambda folder: folder.write_json(REPORT, report))

    def measure(self) -> dict[str, Any]:
        """`final` figures, what the conversion said (`start`), and what each probe finds of this job."""
        run = opened_run(self.folder)
        batches = run.dataset.val_batches(run.batch_size, self.final_tokens)
        found = {"final": evaluate(run.model, batches, precision=run.precision)}
        found["start"] = json.loads((self.folder / REPORT).read_text(encoding="utf-8"))
        return {**found, **{name: probe(self) for name, probe in self.probes}}


@dataclass(frozen=True)
class ConversionWork(Work):
    """A study whose arms' settings are keys of a conversion; an arm without any goes on densely."""

    def source(self, corpus: str, seed: int) -> Path:
        """The dense run of a corpus and seed; the pretrained model is one for all seeds."""
        return self.folder / corpus / "source" / ("pretrained" if corpus == PRETRAINED else f"seed{seed}")

    @cached_property
    def datasets(self) -> dict[str, Dataset]:
        return {corpus: build_data(self.dense(corpus, {})).prepare(progress=False) for corpus in self.study.corpora}

    def dense(self, corpus: str, more: Mapping[str, Any]) -> Recipe:
        """The recipe of the dense runs of a corpus."""
        return load_recipe(ROOT / "recipes" / "dense.yaml", self.dense_settings(corpus, more))

    def dense_settings(self, corpus: str, more: Mapping[str, Any]) -> tuple[str, ...]:
        """Everything set in it."""
        if corpus != PRETRAINED:
            return super().settings(corpus, DENSE, more)
        size, _ = read_model(self.pretrained / "stories260K.bin")
        tokenizer = self.folder / corpus / "tokenizer" / "tokenizer.json"
        if not tokenizer.exists():
            write_tokenizer(self.pretrained / "tok512.bin", tokenizer.parent)
        source = {"kind": "jsonl", "paths": str(self.data / "lm" / "tinystories.jsonl.xz")}
        text = {"data.source": source, "data.tokenizer": {"kind": "file", "path": str(tokenizer), "eos": "<s>"}}
        keys = {"optim.lr": self.study.common["optim.lr"] / 3, **model_settings(size), **text, **READING, **more}
        return tuple(f"{key}={json.dumps(value)}" for key, value in keys.items())

    @property
    def pretrained(self) -> Path:
        return self.data / "checkpoints" / "stories260K"

    def write_pretrained(self) -> None:
        """The public model as a run folder, unless it is there."""
        folder = self.source(PRETRAINED, 0)
        if list_checkpoints(folder / "checkpoints"):
            return
        recipe, (_, weights) = self.dense(PRETRAINED, {}), read_model(self.pretrained / "stories260K.bin")
        model = build_model(recipe, self.datasets[PRETRAINED].vocab_size)
        model.load_state_dict(weights)
        write_run(folder, recipe, model, self.datasets[PRETRAINED], lambda run: None)

    def source_jobs(self) -> list[Job]:
        """The dense runs that are trained here."""
        study, budget = self.study, SOURCE_BUDGETS * self.study.budget
        return [
            Job(
                arm="source",
                size=corpus,
                budget=budget,
                seed=seed,
                recipe=ROOT / "recipes" / "dense.yaml",
                settings=self.dense_settings(corpus, {**self.training(budget), "train.seed": seed}),
                folder=self.source(corpus, seed),
                expected_token_flops=1.0,
                threads=1,
                final_tokens=2048,
                sample=False,
            )
            for seed in study.seeds
            for corpus in study.corpora
            if corpus != PRETRAINED
        ]

    def training(self, budget: float) -> dict[str, Any]:
        """Keys of a run that is evaluated by its job alone."""
        plain = {"train.eval_every": 0, "train.save_every": 0, "train.keep_best": False, "train.tensorboard": False}
        return {"train.budget.flops": budget, "train.eval_tokens": 2048, **plain}

    def _job(self, seed: int, corpus: str, arm: str) -> ConvertedJob:
        study, own = self.study, self.study.arms[arm].settings
        plain = self.dense(corpus, {})
        settings = {"train.seed": seed + 100, **self.training(study.budget)}
        return ConvertedJob(
            arm=arm,
            size=corpus,
            budget=study.budget,
            seed=seed,
            recipe=self.source(corpus, seed) / "recipe.yaml",
            settings=tuple(f"{key}={json.dumps(value)}" for key, value in settings.items()),
            folder=self.run(corpus, arm, seed),
            expected_token_flops=training_flops(plain, self.datasets[corpus].vocab_size),
            threads=1,
            final_tokens=study.final_tokens,
            sample=False,
            source=self.source(corpus, seed),
            conversion=tuple(f"{key}={json.dumps(value)}" for key, value in own.items()) or None,
            probes=tuple(study.arms[arm].probes.items()),
        )

    def train(self, workers: int, board: Board | None = None) -> None:
        """The dense runs first, then what begins with their weights."""
        board, failures = board or Board(), {}
        if PRETRAINED in self.study.corpora:
            self.write_pretrained()
        sources = self.source_jobs()
        for job in sources:
            job.check_same()
        board.start(sources, "dense models")
        run_jobs(sources, workers, board, failures)
        if failures:
            raise RuntimeError(f"{len(failures)} runs failed: " + "; ".join(f"{k}: {v}" for k, v in failures.items()))
        super().train(workers, board)

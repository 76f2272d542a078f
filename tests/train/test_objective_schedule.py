"""Objectives whose weight changes as training goes on."""

import json
from pathlib import Path

import pytest

from moestro.layers import SampledRows
from moestro.model import Transformer
from moestro.objectives import MutualDistillation
from moestro.recipe.build import build_training
from moestro.recipe.load import RecipeError, load_recipe
from moestro.train import CheckpointError, Constant, Cosine, train
from moestro.train.progress import Silent
from moestro.train.schedules import Scheduled, weight_at
from tests.conftest import ROOT
from tests.train.test_resume import require_equal_runs
from tests.train.tiny import Counting, tiny_model, tiny_settings

RECIPE = ROOT / "recipes" / "mutual_distillation.yaml"


def test_the_weight_of_a_step_is_that_of_the_budget_used_before_it() -> None:
    rising = Scheduled(0.5, Constant(warmup=0.5))
    assert [weight_at(rising, step / 8, step) for step in (0, 1, 2, 4, 8)] == [0, 0.125, 0.25, 0.5, 0.5]
    in_steps = Scheduled(0.5, Constant(warmup=4))
    assert [weight_at(in_steps, step / 8, step) for step in (0, 1, 2, 4, 8)] == [0, 0.125, 0.25, 0.5, 0.5]
    falling = Scheduled(2.0, Cosine(warmup=0.0, final=0.0))
    assert weight_at(falling, 0.0, 0) == 2 and weight_at(falling, 1.5, 8) == pytest.approx(0)
    assert weight_at(0.3, 0.0, 0) == 0.3


def recording() -> Transformer:
    model = tiny_model(kinds=("moe", "dense", "moe"))
    for layer in model.moe_layers().values():
        layer.record = SampledRows(1)
    return model


def trained(run: Path, weight: float | Scheduled, progress: Silent | None = None) -> list[dict]:
    settings = tiny_settings(6, save_every=2, eval_every=3, keep_last=1, accumulate=2)
    train(recording(), Counting(), settings, [("together", weight, MutualDistillation())], [], run, progress)
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_interruption_changes_nothing(tmp_path: Path) -> None:
    """Weights, draws and metrics of a run that stops after four steps are those of one that does not."""
    weight = Scheduled(0.5, Constant(warmup=0.5))
    lines = [line for line in trained(tmp_path / "whole", weight) if "total_loss" in line]
    for step, line in enumerate(lines):
        now = min(0.5, step / 6)
        assert line["total_loss"] == pytest.approx(line["loss"] + now * line["objectives"]["together"])
        assert line["objectives"]["together"] > 0

    class Stops(Exception):
        pass

    class Stopping(Silent):
        def show(self, line: dict, share: float) -> None:
            if line["step"] == 5:
                raise Stops

    with pytest.raises(Stops):
        trained(tmp_path / "parts", weight, Stopping())
    with pytest.raises(CheckpointError, match="other objectives: together was .*0.5.*, now 0.5"):
        trained(tmp_path / "parts", 0.5)
    trained(tmp_path / "parts", weight)
    require_equal_runs(tmp_path / "whole", tmp_path / "parts", 6)


def test_recipes_schedule_weights() -> None:
    recipe = load_recipe(RECIPE)
    (_, plain, _), (name, weight, objective) = build_training(recipe)[1]
    assert (name, weight, objective) == ("mutual_distillation", Scheduled(0.05, Constant(0.2)), MutualDistillation())
    assert plain == 0.01 and recipe.resolved["objectives"][1]["schedule"] == {"kind": "constant", "warmup": 0.2}
    assert load_recipe(RECIPE, ["objectives.1.schedule.warmup=0.3"]) != recipe
    with pytest.raises(RecipeError, match="unknown kind 'linear'.*objectives.1.schedule"):
        load_recipe(RECIPE, ["objectives.1.schedule.kind=linear"])

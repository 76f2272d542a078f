"""Objectives with the statistics of the whole step: accumulated micro-batches give the loss of one batch, exactly."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moestro import LoadBalance, ParameterPenalty
from moestro.data import Batch
from moestro.objectives import GroupPenalty, WeightedBalance
from moestro.recipe.build import build_training
from moestro.recipe.load import load_recipe
from moestro.routing import StepTraffic, Trace
from moestro.train import BiasBalance
from moestro.train.step import backward
from tests.conftest import ROOT
from tests.tolerances import FLOAT64
from tests.train.tiny import Counting, tiny_model, tiny_settings


def step(objective, accumulate: int, batch: Batch, rules=(), kinds=("moe", "dense", "moe")) -> tuple[dict, dict]:
    """Gradients and sums of one step of 8 sequences."""
    model = tiny_model(kinds=kinds).double()
    settings = tiny_settings(batch_size=8, accumulate=accumulate)
    sums = backward(model, batch, settings, [("it", 0.7, objective)], rules)
    return {name: p.grad for name, p in model.named_parameters()}, sums


def ragged(batch: Batch) -> Batch:
    """Micro-batches with other numbers of tokens."""
    targets = batch.targets.clone()
    targets[0, 2:] = targets[1, 1:] = targets[5, 5:] = -100
    return Batch(batch.tokens, targets, batch.documents, torch.where(targets == -100, 0, batch.n_bytes))


@pytest.mark.parametrize("make", [LoadBalance, WeightedBalance, ParameterPenalty, GroupPenalty])
@pytest.mark.parametrize("accumulate", [2, 4, 8])
@pytest.mark.parametrize("change", [lambda b: b, ragged], ids=["full", "ragged"])
def test_accumulation_changes_nothing(make, accumulate, change) -> None:
    batch = change(Counting().train_batch(0, 8, seed=0))
    whole, one = step(make(), 1, batch)
    parts, many = step(make(statistics="step"), accumulate, batch)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, **FLOAT64)
    torch.testing.assert_close(many["objective it"], one["objective it"], **FLOAT64)
    torch.testing.assert_close(many["loss"], one["loss"], **FLOAT64)
    assert many["flops"] == pytest.approx(float(one["flops"]))


def test_statistics_of_micro_batches_are_another_loss() -> None:
    batch = Counting().train_batch(0, 8, seed=0)
    whole, _ = step(ParameterPenalty(), 1, batch)
    parts, _ = step(ParameterPenalty(), 8, batch)
    key = "blocks.0.ffn.router.score.weight"
    assert float((parts[key] - whole[key]).abs().max()) > 1e-6


def test_the_pass_that_finds_out_is_counted_as_computed_and_not_observed() -> None:
    batch = Counting().train_batch(0, 8, seed=0)
    seen: list[Trace] = []

    class Watching(BiasBalance):
        def observe(self, trace: Trace) -> None:
            seen.append(trace)

    _, local = step(ParameterPenalty(), 4, batch)
    _, whole = step(ParameterPenalty(statistics="step"), 4, batch, [Watching()])
    forward = float(local["flops_computed"]) / 3
    assert float(whole["flops_computed"]) == pytest.approx(4 * forward)
    assert float(whole["flops"]) == float(local["flops"])
    assert len(seen) == 4 * 2 and all(trace.step is None for trace in seen)
    _, alone = step(ParameterPenalty(statistics="step"), 1, batch)
    assert float(alone["flops_computed"]) == pytest.approx(3 * forward)


def test_a_trace_alone_is_its_own_step() -> None:
    model, batch = tiny_model(kinds=("moe",)), Counting().train_batch(0, 8, seed=0)
    (trace,) = model(batch.tokens).traces
    assert torch.equal(ParameterPenalty(statistics="step")(trace), ParameterPenalty()(trace))
    load: Tensor = trace.routing.load()
    twice = replace(trace, step=StepTraffic(2 * load, 2 * trace.routing.n_tokens, 2))
    torch.testing.assert_close(ParameterPenalty(statistics="step")(twice), ParameterPenalty()(trace))


def test_recipes_can_ask_for_them() -> None:
    asked = "objectives=[{kind: parameter_penalty, weight: 0.01, statistics: step}]"
    _, objectives, _ = build_training(load_recipe(ROOT / "recipes" / "hmoe.yaml", [asked]))
    assert objectives == [("parameter_penalty", 0.01, ParameterPenalty("mean", "step"))]


def test_other_statistics_are_refused() -> None:
    for make in (LoadBalance, ParameterPenalty):
        with pytest.raises(ValueError, match="statistics='batch', allowed: micro_batch, step"):
            make(statistics="batch")  # type: ignore[arg-type]

"""Steering top-p towards a mean number of experts."""

import pytest
import torch

from moestro import FFNBank, LinearScore, MoELayer, ScoredRouter
from moestro.evaluate.knobs import quality_curve, setting
from moestro.model import Attention, Block, Transformer
from moestro.recipe.build import build_model, build_training
from moestro.recipe.load import load_recipe
from moestro.recipe.syntax import RecipeError
from moestro.routers import SteeredTopP
from moestro.train import SteerThreshold, train
from moestro.train.checkpoint import read_state
from moestro.train.step import backward
from moestro.train.weights import load_weights, newest_checkpoint
from tests.conftest import ROOT
from tests.train.test_resume import Killed, require_equal_runs
from tests.train.tiny import VOCABULARY, WIDTH, Counting, tiny_model, tiny_settings

E = 6


def layer(start: float = 0.9) -> MoELayer:
    router = ScoredRouter(LinearScore(WIDTH, E, init_std=1.0), SteeredTopP(start, renormalize=False, strict=True))
    return MoELayer(router, [FFNBank(WIDTH, [2] * E)])


def model(seed: int = 0, start: float = 0.9) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(VOCABULARY, WIDTH, [Block(WIDTH, Attention(WIDTH, 2), layer(start)) for _ in range(2)])


def thresholds(of: Transformer) -> list[float]:
    return [moe.router.select.threshold for moe in of.moe_layers().values()]


@pytest.mark.parametrize(("start", "target"), [(0.9, 1.5), (0.0, 2.0), (1.0, 2.5)])
def test_the_mean_number_of_experts_reaches_the_target(start, target):
    torch.manual_seed(0)
    moe, rule = layer(start), SteerThreshold(target, integral=0.1)
    rule.start(moe, None)
    x, means = torch.randn(500, WIDTH), []
    for step in range(1, 121):
        _, (trace,) = moe(x)
        means.append(float(trace.experts_per_token().mean()))
        rule.observe(trace)
        rule.apply(step)
    assert abs(means[0] - target) > 0.3
    assert max(abs(mean - target) for mean in means[-20:]) < 0.05


def test_one_step_is_the_controller_s():
    moe, rule = layer(0.5), SteerThreshold(2.0, proportional=0.3, integral=0.05)
    rule.start(moe, None)
    x, p, errors = torch.randn(3, 20, WIDTH), 0.5, []
    for step in (1, 2, 3):
        rows = 0.0
        for part in x * step:
            _, (trace,) = moe(part)
            rows += trace.routing.n_rows
            rule.observe(trace)
        errors.append((2.0 - rows / 60) / E)
        rule.apply(step)
        p += 0.3 * (errors[-1] - errors[max(0, step - 2)]) + 0.05 * errors[-1]
        assert moe.router.select.threshold == pytest.approx(p, abs=1e-12)
    assert rule.state_dict() == {"error": pytest.approx(errors[-1], abs=1e-12)}


def test_a_limit_is_left_as_soon_as_the_error_turns():
    moe, rule = layer(1.0), SteerThreshold(6.0, integral=0.1)
    rule.start(moe, None)
    _, (trace,) = moe(torch.randn(50, WIDTH))
    for step in range(1, 50):
        rule.observe(trace)
        rule.apply(step)
    assert moe.router.select.threshold == 1.0
    rule.target = 2.0
    rule.observe(trace)
    rule.apply(50)
    assert moe.router.select.threshold < 0.95


def test_accumulation_changes_nothing():
    batch, ends = Counting().train_batch(0, 4, 0), []
    for accumulate in (1, 2, 4):
        fresh, rule = model(), SteerThreshold(1.5)
        rule.start(fresh, None)
        backward(fresh, batch, tiny_settings(accumulate=accumulate), [], [rule])
        rule.apply(1)
        ends.append(thresholds(fresh))
    assert ends[0] == ends[1] == ends[2] != thresholds(model())


def test_evaluation_and_recomputation_do_not_count(tmp_path):
    ends = []
    for number, (recompute, every) in enumerate([(False, 0), (True, 0), (False, 1)]):
        trained = model()
        settings = tiny_settings(5, recompute=recompute, eval_every=every, accumulate=2)
        train(trained, Counting(), settings, [], [SteerThreshold(1.5)], tmp_path / str(number))
        ends.append(thresholds(trained))
    assert ends[0] == ends[1] == ends[2] and ends[0][0] == ends[0][1] < 0.9


def test_an_interrupted_run_ends_as_a_whole_one_and_is_evaluated_with_its_threshold(tmp_path):
    class DiesAt(SteerThreshold):
        def apply(self, step: int) -> None:
            if step == 7:
                raise Killed
            super().apply(step)

    DiesAt.__name__ = "SteerThreshold"
    whole, settings = model(), tiny_settings(12, save_every=5)
    train(whole, Counting(), settings, [], [SteerThreshold(1.5)], tmp_path / "whole")
    with pytest.raises(Killed):
        train(model(), Counting(), settings, [], [DiesAt(1.5)], tmp_path / "half")
    saved = tmp_path / "half" / "checkpoints" / "step-00000005"
    assert read_state(saved)["rules"][1]["error"] is not None
    train(model(3), Counting(), settings, [], [SteerThreshold(1.5)], tmp_path / "half")
    require_equal_runs(tmp_path / "half", tmp_path / "whole", 12)
    loaded = model(4).bfloat16()
    load_weights(loaded, newest_checkpoint(tmp_path / "half"))
    assert thresholds(loaded) == thresholds(whole) != [0.9, 0.9]


def test_the_threshold_can_be_turned_after_training():
    steered = model()
    curve = quality_curve(steered, lambda: Counting().val_batches(4), "threshold", [0.0, 0.9, 1.0])
    experts = [point["experts"] for point in curve["points"]]
    assert experts[0] == 1 < experts[1] < experts[2] == E
    assert setting(steered, "threshold") == 0.9


def test_recipes_know_selection_and_rule():
    overrides = [
        "model.ffn.router.select={kind: steered_top_p, start: 0.4, renormalize: false}",
        "rules=[{kind: steer_threshold, target: 2}]",
    ]
    recipe = load_recipe(ROOT / "recipes" / "moe.yaml", overrides)
    (rule,) = build_training(recipe)[2]
    assert isinstance(rule, SteerThreshold) and rule.target == 2
    assert thresholds(build_model(recipe, 16)) == [0.4] * 4
    with pytest.raises(RecipeError, match="unknown key 'threshold'"):
        load_recipe(ROOT / "recipes" / "moe.yaml", [*overrides, "model.ffn.router.select.threshold=0.5"])


def test_values_are_checked(tmp_path):
    for options in ({"target": 0.5}, {"target": 2, "proportional": -1}, {"target": 2, "integral": 0}):
        with pytest.raises(ValueError, match="steer threshold .* allowed: "):
            SteerThreshold(**options)
    with pytest.raises(ValueError, match=r"found nothing to steer; allowed: select: \{kind: steered_top_p"):
        train(tiny_model(), Counting(), tiny_settings(2), [], [SteerThreshold(2)], tmp_path)
    with pytest.raises(ValueError, match="target=7: no layer has so many experts"):
        SteerThreshold(7).start(model(), None)
    rule = SteerThreshold(2)
    rule.start(model(), None)
    with pytest.raises(ValueError, match="no layer that is steered was used in step 1"):
        rule.apply(1)
    with pytest.raises(ValueError, match="threshold=1.5, allowed: between 0 and 1"):
        SteeredTopP(1.5)

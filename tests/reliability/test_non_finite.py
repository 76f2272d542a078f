"""Steps that are not finite: what the policy does with them, what is logged, and that they continue exactly."""

import io
import math
import re

import pytest
import torch

from moestro import FFNBank, LoadBalance, MoELayer, ScoredRouter
from moestro.compare.results import curve, read_metrics
from moestro.routers import BiasedRouter, CosineScore, LinearScore, ReLU, SteeredTopP, TopAny
from moestro.train import AdaptiveExperts, BiasBalance, Diverged, GateSparsity, Lines, SteerThreshold, train
from moestro.train.checkpoint import read_state
from moestro.train.metrics import scalars
from tests.train.test_loop import lines_of, timeless
from tests.train.test_resume import Killed, remembered, require_equal_runs
from tests.train.tiny import WIDTH, Counting, tiny_model, tiny_settings


class Broken(Counting):
    """Data whose batches `steps` make a model's activations `value`, everywhere behind the embedding."""

    def __init__(self, steps=(), value: float = math.nan, dies_at: int | None = None) -> None:
        super().__init__()
        self.steps, self.value, self.dies_at, self.now = set(steps), value, dies_at, 0

    def in_front_of(self, model):
        model.embedding.register_forward_hook(lambda module, inputs, output: output * self.factor if self.now else None)
        return model

    @property
    def factor(self) -> float:
        return self.value if self.now - 1 in self.steps else 1.0

    def train_batch(self, step, batch_size, seed):
        if step == self.dies_at:
            raise Killed
        self.now = step + 1
        return super().train_batch(step, batch_size, seed)

    def val_batches(self, batch_size, max_tokens=None):
        self.now = 0
        return super().val_batches(batch_size, max_tokens)


class Exploding(Broken):
    """Data whose batches `steps` make the logits a thousand times too large."""

    def __init__(self, steps=(), dies_at: int | None = None) -> None:
        super().__init__(steps, 1e3, dies_at)

    def in_front_of(self, model):
        model.norm.register_forward_hook(lambda module, inputs, output: output * self.factor if self.now else None)
        return model


def run(folder, data, model=None, objectives=(), rules=(), steps=12, display=None, **settings):
    """The result of training with steps left out."""
    settings = tiny_settings(steps, **{"non_finite": "skip", "save_every": 1, "keep_last": 99, **settings})
    model = data.in_front_of(tiny_model() if model is None else model)
    return train(model, data, settings, list(objectives), list(rules), folder, display)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_skipped_step_changes_neither_weights_nor_moments_and_is_counted(tmp_path, value):
    shown = io.StringIO()
    result = run(tmp_path, Broken({4}, value), display=Lines(shown, seconds=0))
    before, after = remembered(tmp_path, 4), remembered(tmp_path, 5)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    (line,) = (line for line in lines_of(tmp_path) if "skipped" in line)
    assert line["step"] == 5 and line["skipped"] == "loss = nan, gradient norm = nan"
    assert "loss" not in line and line["tokens"] == 5 * 24 and line["lr"] > 0
    assert "skipped" not in dict(scalars(line)) and "step 5  " in shown.getvalue()
    assert "skipped: loss = nan, gradient norm = nan" in shown.getvalue()
    assert result["skipped"] == 1 and result["step"] == 12


def test_later_steps_are_those_of_a_run_that_never_met_the_batch(tmp_path):
    """Weights, moments and random state: skipping the sixth batch, then training on the seventh, is training on the
    seventh after five."""
    run(tmp_path / "skipped", Broken({5}))
    run(tmp_path / "whole", Broken())
    states = [read_state(tmp_path / name / "checkpoints" / "step-00000006") for name in ("skipped", "whole")]
    assert states[0]["random"] == states[1]["random"]
    assert [state["counters"]["skipped"] for state in states] == [1, 0]
    five, six = remembered(tmp_path / "whole", 5), remembered(tmp_path / "skipped", 6)
    assert all(torch.equal(five[name], six[name]) for name in five)


@pytest.mark.parametrize("dies_at", [3, 4, 5, 9])
def test_killed_around_skipped_steps_it_ends_as_if_it_had_not_been(tmp_path, dies_at):
    settings = {"save_every": 2, "keep_last": 2, "accumulate": 2}
    run(tmp_path / "whole", Broken({3, 4, 8}), **settings)
    with pytest.raises(Killed):
        run(tmp_path / "killed", Broken({3, 4, 8}, dies_at=dies_at), **settings)
    result = run(tmp_path / "killed", Broken({3, 4, 8}), **settings)
    require_equal_runs(tmp_path / "killed", tmp_path / "whole", 12)
    assert result["skipped"] == 3 and sum("skipped" in line for line in timeless(tmp_path / "killed")) == 3


def test_steps_in_a_row_are_bounded_and_the_count_survives_the_process(tmp_path):
    message = r"step 8: loss = nan.*, the last of 4 steps in a row \(train\.most_skipped=3\)\. Try, "
    with pytest.raises(Killed):
        run(tmp_path, Broken(range(4, 12), dies_at=6), most_skipped=3)
    with pytest.raises(Diverged, match=message):
        run(tmp_path, Broken(range(4, 12)), most_skipped=3)
    # the folder is as the step before left it: with a batch that is whole it goes on
    assert run(tmp_path, Broken({4, 5, 6}), most_skipped=3)["skipped"] == 3


def test_a_run_that_stopped_goes_on_with_the_other_policy(tmp_path):
    with pytest.raises(Diverged, match=r"step 6: loss = nan.*leave such steps out \(train\.non_finite=skip\)"):
        run(tmp_path, Broken({5}), non_finite="stop")
    assert run(tmp_path, Broken({5}))["skipped"] == 1


@pytest.mark.parametrize("dies_at", [None, 25, 26])
def test_an_exploding_loss_is_left_out_where_that_is_asked_for(tmp_path, dies_at):
    """Finite, and far beyond the usual; what is usual survives the process."""
    asked = {"spike": 3.0, "steps": 30, "save_every": 5, "keep_last": 2, "eval_every": 0}
    if dies_at is not None:
        with pytest.raises(Killed):
            run(tmp_path, Exploding({10, 25}, dies_at), **asked)
    result = run(tmp_path, Exploding({10, 25}), **asked)
    # the tenth came before anything was usual
    (line,) = (line for line in lines_of(tmp_path) if "skipped" in line)
    assert line["step"] == 26 and result["skipped"] == 1
    found = re.fullmatch(r"loss = ([\d.]+), usual ([\d.]+)(;.*)? \(train.spike=3\)", line["skipped"])
    assert found and float(found[1]) > 3 * float(found[2])
    whole = run(tmp_path / "whole", Exploding({10, 25}), **asked)
    assert whole["eval"] == result["eval"]


def test_an_exploding_loss_ends_a_run_that_says_so_and_is_nothing_else(tmp_path):
    asked = {"steps": 30, "eval_every": 0, "non_finite": "stop"}
    with pytest.raises(Diverged, match=r"step 26: loss = .* usual .*\(train.spike=3\).*train\.non_finite=skip"):
        run(tmp_path, Exploding({25}), spike=3.0, **asked)
    assert run(tmp_path, Exploding({25}), **asked)["skipped"] == 0


def test_an_objective_alone_is_enough(tmp_path):
    data = Broken()
    objective = ("balance", 0.1, lambda trace: LoadBalance()(trace) * (math.inf if data.now == 3 else 1.0))
    run(tmp_path, data, tiny_model(kinds=("moe",)), objectives=[objective])
    (line,) = (line for line in lines_of(tmp_path) if "skipped" in line)
    assert line["step"] == 3 and line["skipped"].startswith("balance = inf")


def mixture(router):
    model = tiny_model(kinds=("dense",))
    model.blocks[0].ffn = MoELayer(router, [FFNBank(WIDTH, [4] * 5)])
    return model


RULES = {
    "bias": (lambda: mixture(BiasedRouter(LinearScore(WIDTH, 5), top_k=2)), lambda: BiasBalance(0.1)),
    "relu": (lambda: mixture(ScoredRouter(LinearScore(WIDTH, 5), ReLU(2))), GateSparsity),
    "top-p": (lambda: mixture(ScoredRouter(LinearScore(WIDTH, 5), SteeredTopP(0.5))), lambda: SteerThreshold(2)),
    "top-any": (
        lambda: mixture(ScoredRouter(CosineScore(WIDTH, 5, 1.0), TopAny(5), 3)),
        lambda: AdaptiveExperts(every=3, window=2),
    ),
    "queries": (lambda: tiny_model(kinds=("peer",)), None),
}


@pytest.mark.parametrize("kind", RULES)
def test_rules_forget_what_a_skipped_step_showed(tmp_path, kind):
    """The state of every rule after the skipped step is that before it, and stays finite."""
    make, rule = RULES[kind]
    run(tmp_path, Broken({6}), make(), rules=[] if rule is None else [rule()], optim=tiny_settings().optim)
    before, after = (read_state(tmp_path / "checkpoints" / f"step-0000000{step}") for step in (6, 7))
    assert all(torch.equal(remembered(tmp_path, 6)[name], value) for name, value in remembered(tmp_path, 7).items())
    assert len(before["rules"]) == len(after["rules"])
    assert all(value.isfinite().all() for value in remembered(tmp_path, 12).values())


def test_an_update_that_is_due_at_a_skipped_step_is_made(tmp_path):
    """AdaptiveExperts counts steps by their number: after a skipped one the next update is not a window later."""
    make, rule = RULES["top-any"]
    adaptive = rule()
    run(tmp_path, Broken({5}), make(), rules=[adaptive], steps=7)
    assert adaptive.step == 7 and not adaptive.seen


def test_a_report_shows_runs_with_skipped_steps(tmp_path):
    """A skipped step before an evaluation, and as the last one."""
    run(tmp_path, Broken({3, 11}))
    steps, evaluations = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert [point["tokens"] for point in curve(steps, evaluations)] == [96, 192, 288]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"non_finite": "ignore"}, "allowed are 'stop', 'skip'"),
        ({"most_skipped": 0}, "must be at least 1"),
        ({"spike": 1.0}, "must be above 1"),
    ],
)
def test_settings_are_checked(setting, message):
    with pytest.raises(ValueError, match=message):
        tiny_settings(**setting)

"""Whole runs: what they write, how long they go on, how they stop."""

import json
import os
import signal

import pytest
import torch

from moestro import LoadBalance
from moestro.evaluate import evaluate
from moestro.train import (
    Budget,
    Cosine,
    Diverged,
    OptimSettings,
    TrainingStopped,
    best_checkpoint,
    load_weights,
    newest_checkpoint,
    train,
)
from moestro.train.checkpoint import CheckpointError, list_checkpoints
from moestro.train.signals import StopSignal
from tests.train.tiny import SEQUENCE, Counting, tiny_model, tiny_settings


def lines_of(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def timeless(run) -> list[dict]:
    return [{key: value for key, value in line.items() if key != "time"} for line in lines_of(run)]


def test_a_run_learns_and_leaves_its_folder(tmp_path):
    model, settings = tiny_model(), tiny_settings(steps=60, optim=OptimSettings(lr=0.02), eval_every=20, save_every=30)
    result = train(model, Counting(), settings, [], [], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "lock", "environment.json", "metrics.jsonl", "checkpoints", "done.json", "hashes.json",
    }  # fmt: skip
    evaluations = [line["eval"] for line in lines_of(tmp_path) if "eval" in line]
    steps = [line for line in lines_of(tmp_path) if "eval" not in line]
    assert [line["step"] for line in steps] == list(range(1, 61))
    assert len(evaluations) == 3
    assert evaluations[-1]["loss"] < 0.6 * steps[0]["loss"]
    assert result == json.loads((tmp_path / "done.json").read_text())
    assert result["eval"] == evaluations[-1] == evaluate(model, Counting().val_batches(4))
    assert (result["step"], result["tokens"]) == (60, 60 * 4 * SEQUENCE)
    assert result["flops"] == steps[-1]["flops"] > 0
    assert result["flops_computed"] == steps[-1]["flops_computed"] > result["flops"]
    assert result["params_total"] == sum(p.numel() for p in model.parameters()) > result["params_active"]
    session = json.loads((tmp_path / "environment.json").read_text())[0]
    assert session["packages"]["torch"] == torch.__version__
    assert session["from_step"] == 0


def test_a_line_of_metrics(tmp_path):
    train(tiny_model(kinds=("moe",)), Counting(), tiny_settings(3), [("balance", 0.1, LoadBalance())], [], tmp_path)
    line = lines_of(tmp_path)[0]
    assert list(line) == [
        "step", "tokens", "flops", "flops_computed", "loss", "total_loss", "objectives", "lr", "grad_norm", "bpb",
        "active_params", "time",
    ]  # fmt: skip
    assert line["total_loss"] == line["loss"] + 0.1 * line["objectives"]["balance"]
    assert line["time"].keys() == {"seconds", "step_seconds", "tokens_per_s"}


def test_two_runs_are_equal_to_the_bit(tmp_path):
    models = []
    for name in ("one", "two"):
        model = tiny_model()
        train(model, Counting(), tiny_settings(8, accumulate=2), [], [], tmp_path / name)
        models.append(model.state_dict())
    assert timeless(tmp_path / "one") == timeless(tmp_path / "two")
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_the_learning_rate_is_the_schedules_in_the_middle_of_each_step(tmp_path):
    schedule = Cosine(warmup=4, final=0.1)
    settings = tiny_settings(10, optim=OptimSettings(lr=0.5, schedule=schedule))
    train(tiny_model(), Counting(), settings, [], [], tmp_path)
    rates = [line["lr"] for line in lines_of(tmp_path) if "lr" in line]
    assert rates == pytest.approx([0.5 * schedule((i + 0.5) / 10, 0.1) for i in range(10)])
    assert 0 < rates[0] < rates[1] < rates[2] < rates[3] < rates[4] > rates[5] > rates[9] > 0.05


def test_a_token_budget_ends_with_the_step_that_reaches_it(tmp_path):
    result = train(tiny_model(), Counting(), tiny_settings(budget=Budget(tokens=100)), [], [], tmp_path)
    assert (result["step"], result["tokens"]) == (5, 5 * 4 * SEQUENCE)


def test_a_flops_budget_ends_with_the_step_that_reaches_it(tmp_path):
    budget = Budget(flops=1e6)
    result = train(tiny_model(), Counting(), tiny_settings(budget=budget), [], [], tmp_path)
    steps = [line for line in lines_of(tmp_path) if "flops" in line]
    assert steps[-2]["flops"] < 1e6 <= steps[-1]["flops"] == result["flops"]
    assert result["step"] == len(steps) > 3


def test_a_finished_run_is_not_run_again(tmp_path):
    first = train(tiny_model(), Counting(), tiny_settings(3), [], [], tmp_path)
    before = (tmp_path / "metrics.jsonl").stat().st_mtime_ns

    class Untouchable(Counting):
        def train_batch(self, step, batch_size, seed):
            raise AssertionError("trained again")

    assert train(tiny_model(), Untouchable(), tiny_settings(3), [], [], tmp_path) == first
    assert (tmp_path / "metrics.jsonl").stat().st_mtime_ns == before


def test_without_cadences_it_evaluates_and_saves_once(tmp_path):
    train(tiny_model(), Counting(), tiny_settings(4, eval_every=0, save_every=0), [], [], tmp_path)
    assert [line["step"] for line in lines_of(tmp_path) if "eval" in line] == [4]
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000004"]


class Forgetting(Counting):
    """Held-out text that gets worse after the second evaluation, whatever the model does."""

    evaluations = 0

    def val_batches(self, batch_size, max_tokens=None):
        self.evaluations += 1
        for batch in super().val_batches(batch_size):
            targets = batch.targets if self.evaluations == 2 else (batch.targets * 0)
            yield type(batch)(batch.tokens, targets, batch.documents, batch.n_bytes)


def test_the_best_checkpoint_survives_the_newer_ones(tmp_path):
    model = tiny_model()
    settings = tiny_settings(40, eval_every=10, save_every=4, keep_last=2, optim=OptimSettings(lr=0.02))
    result = train(model, Forgetting(), settings, [], [], tmp_path)
    names = [path.name for path in list_checkpoints(tmp_path / "checkpoints")]
    assert names == ["step-00000020", "step-00000036", "step-00000040"]
    assert best_checkpoint(tmp_path).name == "step-00000020"
    assert newest_checkpoint(tmp_path).name == "step-00000040"
    assert result["best"]["step"] == 20
    other = tiny_model(seed=3)
    load_weights(other, newest_checkpoint(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_run_without_checkpoints_has_none_to_load(tmp_path):
    with pytest.raises(CheckpointError, match="has no checkpoint: train it first"):
        newest_checkpoint(tmp_path)


class Exploding(Counting):
    """From step 6 on, the data break the model."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def train_batch(self, step, batch_size, seed):
        if step == 6:
            with torch.no_grad():
                self.model.norm.weight.fill_(float("inf"))
        return super().train_batch(step, batch_size, seed)


def test_a_diverging_run_stops_and_keeps_its_folder(tmp_path):
    model = tiny_model()
    with pytest.raises(Diverged, match=r"step 7: loss = (nan|inf).*Try, in a new run folder, a lower optim\.lr"):
        train(model, Exploding(model), tiny_settings(12), [], [], tmp_path)
    assert [line["step"] for line in lines_of(tmp_path) if "eval" not in line] == [1, 2, 3, 4, 5, 6]
    assert newest_checkpoint(tmp_path).name == "step-00000005"
    load_weights(tiny_model(), newest_checkpoint(tmp_path))
    # Continued with data that do not explode, it ends as if nothing had happened.
    train(tiny_model(), Counting(), tiny_settings(12), [], [], tmp_path)
    train(tiny_model(), Counting(), tiny_settings(12), [], [], tmp_path.with_name("whole"))
    assert timeless(tmp_path) == timeless(tmp_path.with_name("whole"))


class Poisoned(Counting):
    """Held-out text under which the model's parameters turn to NaN."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def val_batches(self, batch_size, max_tokens=None):
        with torch.no_grad():
            self.model.head.weight[0, 0] = float("nan")
        return super().val_batches(batch_size)


def test_a_broken_evaluation_stops_before_anything_is_saved(tmp_path):
    model = tiny_model()
    with pytest.raises(Diverged, match="step 4: held-out loss = nan"):
        train(model, Poisoned(model), tiny_settings(12), [], [], tmp_path)
    assert list_checkpoints(tmp_path / "checkpoints") == []


def test_a_finished_run_is_not_the_result_of_other_settings(tmp_path):
    train(tiny_model(), Counting(), tiny_settings(3), [], [], tmp_path)
    with pytest.raises(CheckpointError, match="other settings: seed was 0, now 1"):
        train(tiny_model(), Counting(), tiny_settings(3, seed=1), [], [], tmp_path)


def test_a_second_signal_acts_as_usual():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert stop.name is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.name == "SIGTERM"
        assert signal.getsignal(signal.SIGTERM) is before


class Interrupting(Counting):
    """Sends this process a signal while it trains."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def train_batch(self, step, batch_size, seed):
        if step == 6:
            os.kill(os.getpid(), self.number)
        return super().train_batch(step, batch_size, seed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops_after_the_step(tmp_path, number):
    before = signal.getsignal(number)
    with pytest.raises(TrainingStopped, match=rf"stopped by {number.name}, saved .*step-00000007; the same command"):
        train(tiny_model(), Interrupting(number), tiny_settings(12), [], [], tmp_path)
    assert signal.getsignal(number) is before
    assert not (tmp_path / "done.json").exists()
    train(tiny_model(), Counting(), tiny_settings(12), [], [], tmp_path)
    train(tiny_model(), Counting(), tiny_settings(12), [], [], tmp_path.with_name("whole"))
    assert timeless(tmp_path) == timeless(tmp_path.with_name("whole"))


def test_the_models_mode_and_gradients_do_not_leak_into_training(tmp_path):
    clean, used = tiny_model(), tiny_model()
    used.eval()
    for parameter in used.parameters():
        parameter.grad = torch.ones_like(parameter)
    train(clean, Counting(), tiny_settings(3), [], [], tmp_path / "clean")
    train(used, Counting(), tiny_settings(3), [], [], tmp_path / "used")
    assert timeless(tmp_path / "clean") == timeless(tmp_path / "used")

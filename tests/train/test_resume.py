"""Interrupted training ends as uninterrupted training does, to the last bit."""

import functools
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from moestro.ops.whole_files import TEMPORARY
from moestro.train import CheckpointError, Lines, OptimSettings, Rule, train
from moestro.train.checkpoint import read_tensors
from tests.train.killed_run import STEPS
from tests.train.test_checkpoint import flip_last_bit
from tests.train.test_loop import timeless
from tests.train.tiny import Counting, tiny_model, tiny_settings

ROOT = Path(__file__).resolve().parents[2]


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


def remembered(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of a run's checkpoint."""
    path = run / "checkpoints" / f"step-{step:08d}"
    return {f"{name} {k}": v for name in ("model", "optimizer") for k, v in read_tensors(path, name).items()}


def require_equal_runs(one: Path, other: Path, step: int) -> None:
    assert timeless(one) == timeless(other)
    first, second = remembered(one, step), remembered(other, step)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An uninterrupted run of 6 steps."""
    run = tmp_path_factory.mktemp("whole")
    train(tiny_model(), Counting(), short(), [], [], run)
    return run


def short():
    return tiny_settings(6, save_every=2, eval_every=3, keep_last=1, accumulate=2)


def test_dying_at_any_moment_of_writing_changes_nothing(tmp_path, monkeypatch):
    """The process ends at the first, second, ... file operation, until the run gets through."""
    settings = tiny_settings(4, save_every=2, eval_every=3, keep_last=1)
    train(tiny_model(), Counting(), settings, [], [], tmp_path / "whole")
    operations = ("fsync", "rename", "replace")
    real = {name: getattr(os, name) for name in operations}
    for moment in range(1000):
        done = itertools.count()

        def dying(operation, *arguments, moment=moment, done=done):
            if next(done) >= moment:
                raise Killed
            return operation(*arguments)

        run = tmp_path / str(moment)
        with monkeypatch.context() as patch:
            for name in operations:
                patch.setattr(os, name, functools.partial(dying, real[name]))
            try:
                train(tiny_model(), Counting(), settings, [], [], run)
                break
            except Killed:
                pass
        train(tiny_model(), Counting(), settings, [], [], run)
        require_equal_runs(run, tmp_path / "whole", 4)
        assert not list(run.rglob(TEMPORARY + "*"))
    assert moment > 30


class Mortal(Counting):
    def __init__(self, last: int) -> None:
        super().__init__()
        self.last = last

    def train_batch(self, step, batch_size, seed):
        if step == self.last:
            raise Killed
        return super().train_batch(step, batch_size, seed)


@pytest.mark.parametrize("last", range(6))
def test_dying_at_any_step_changes_nothing(tmp_path, whole, last):
    with pytest.raises(Killed):
        train(tiny_model(), Mortal(last), short(), [], [], tmp_path)
    train(tiny_model(), Counting(), short(), [], [], tmp_path)
    require_equal_runs(tmp_path, whole, 6)


class Noisy(Counting):
    """Data that draw from torch's own generator, as a noisy router would."""

    def train_batch(self, step, batch_size, seed):
        return self._batch(batch_size, torch.Generator().manual_seed(int(torch.randint(10**6, ()))))


class NoisyMortal(Mortal):
    def train_batch(self, step, batch_size, seed):
        super().train_batch(step, batch_size, seed)
        return Noisy().train_batch(step, batch_size, seed)


class Remembering(Rule):
    """A rule whose state matters: moves a weight by the running mean of loads."""

    def __init__(self, model) -> None:
        self.model, self.mean, self.step = model, torch.zeros(3), 0

    def observe(self, trace) -> None:
        if trace.routing.n_experts == 3:
            self.mean = 0.9 * self.mean + 0.1 * trace.routing.load()

    def apply(self, step: int) -> None:
        self.step = step
        with torch.no_grad():
            self.model.norm.weight.add_(1e-3 * self.mean.mean() / self.step)

    def state_dict(self) -> dict:
        return {"mean": self.mean, "step": self.step}

    def load_state_dict(self, state: dict) -> None:
        self.mean, self.step = state["mean"], state["step"]


def test_random_state_and_rules_are_continued(tmp_path):
    runs = []
    for name, data in (("whole", Noisy()), ("killed", NoisyMortal(5))):
        model = tiny_model()
        try:
            train(model, data, short(), [], [Remembering(model)], tmp_path / name)
        except Killed:
            torch.manual_seed(99)
            model = tiny_model(seed=5)
            train(model, Noisy(), short(), [], [Remembering(model)], tmp_path / name)
        runs.append(tmp_path / name)
    require_equal_runs(runs[0], runs[1], 6)


@pytest.fixture
def stopped(tmp_path) -> Path:
    """A run that died in its sixth step, with checkpoints after the second and the fourth."""
    with pytest.raises(Killed):
        train(tiny_model(), Mortal(5), tiny_settings(6, save_every=2), [], [], tmp_path)
    return tmp_path


def test_continuing_is_said(stopped, capsys):
    train(tiny_model(), Counting(), tiny_settings(6, save_every=2), [], [], stopped, Lines(sys.stdout))
    assert "continuing from step-00000004" in capsys.readouterr().out


def test_a_damaged_checkpoint_is_never_passed_over(stopped):
    newest = stopped / "checkpoints" / "step-00000004"
    flip_last_bit(newest / "optimizer.safetensors")
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors has sha256 .* step-00000002 is intact: remove"):
        train(tiny_model(), Counting(), tiny_settings(6, save_every=2), [], [], stopped)


@pytest.mark.parametrize(
    ("settings", "objectives", "rules", "message"),
    [
        ({"batch_size": 8}, [], [], r"step-00000004 was written with other settings: batch_size was 4, now 8"),
        ({"optim": OptimSettings(lr=0.5)}, [], [], r"other settings: optim\.lr was 0\.01, now 0\.5"),
        ({}, [("size", 0.1, lambda trace: trace.x.mean())], [], r"other objectives: size was None, now 0\.1"),
        ({}, [], [Remembering(None)], "other rule_kinds: 1 was None, now Remembering"),
    ],
)
def test_continuing_with_something_else_is_refused(stopped, settings, objectives, rules, message):
    with pytest.raises(CheckpointError, match=message):
        train(tiny_model(), Counting(), tiny_settings(6, **settings), objectives, rules, stopped)


def test_continuing_with_other_data_is_refused(stopped):
    data = Counting()
    data.fingerprint = "other"
    with pytest.raises(CheckpointError, match="other data: fingerprint was counting, now other"):
        train(tiny_model(), data, tiny_settings(6), [], [], stopped)


def test_cadences_may_change(stopped):
    settings = tiny_settings(6, save_every=1, eval_every=2, keep_last=5)
    assert train(tiny_model(), Counting(), settings, [], [], stopped)["step"] == 6


@pytest.fixture
def forks():
    """A process that forks training processes."""
    command = [sys.executable, "-m", "tests.train.killed_run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:
        yield process
        process.kill()


def launch(forks, run: Path, disk: str) -> int:
    """Start training; returns the pid."""
    forks.stdin.write(f"{run} {disk}\n")
    return int(forks.stdout.readline())


def wait_until(happened) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def written(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def saving(run: Path) -> bool:
    return any((run / "checkpoints").glob(TEMPORARY + "*"))


def test_a_process_killed_again_and_again_ends_as_one_that_was_not(tmp_path, forks):
    """SIGKILL at random moments of training and, with slow disks, in the middle of saving; real processes."""
    dice = random.Random(0)
    whole, run = tmp_path / "whole", tmp_path / "killed"
    launch(forks, whole, "fast")
    assert int(forks.stdout.readline()) == 0
    for attempt in range(8):
        disk = ("fast", "slow")[attempt % 2]
        more = written(run) + dice.randint(1, 8)
        pid = launch(forks, run, disk)
        wait_until(lambda more=more: written(run) >= more)
        if disk == "slow":
            wait_until(lambda: saving(run))
        time.sleep(dice.uniform(0, 0.03))
        os.kill(pid, signal.SIGKILL)
        assert int(forks.stdout.readline()) == -signal.SIGKILL
        assert not (run / "done.json").exists()
    launch(forks, run, "fast")
    assert int(forks.stdout.readline()) == 0
    require_equal_runs(run, whole, STEPS)

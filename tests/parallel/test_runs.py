"""Runs on several ranks: they are those of one process, go on from one another's checkpoints, and end together."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from moestro.formats.writer import write_tensors
from moestro.objectives import ParameterPenalty
from moestro.ops.whole_files import HASHES
from moestro.parallel.layout import whole, write_rows
from moestro.parallel.ranks import Ranks, joined
from moestro.parallel.settings import ParallelSettings
from moestro.train import AdaptiveExperts, CheckpointError, Diverged, Rule, TrainingStopped, load_weights, train
from moestro.train.checkpoint import join_model, read_state, read_tensors
from tests.parallel.models import SYSTEMS
from tests.parallel.processes import in_ranks
from tests.tolerances import FLOAT32
from tests.train.test_checkpoint import flip_last_bit
from tests.train.test_loop import timeless
from tests.train.tiny import Counting, tiny_settings

WAIT = ParallelSettings(timeout_s=60)
STEPS = 6


def go(
    rank: int,
    run: Path,
    system: str = "hmoe",
    rules: Callable[[], Sequence[Rule]] = list,
    parallel: ParallelSettings = WAIT,
    **changes: Any,
) -> dict[str, Any]:
    """Train on the ranks that there are; leaves rules' states and `available` experts of each beside the run."""
    plan = {"batch_size": 8, "save_every": 2, "eval_every": 3, "keep_last": 9, "parallel": parallel}
    with joined("cpu", parallel) as ranks:
        torch.manual_seed(0)
        model, _ = SYSTEMS[system]()
        made = list(rules())
        objectives = [("penalty", 0.3, ParameterPenalty(statistics="step"))]
        result = train(
            model, Counting(), tiny_settings(STEPS, **{**plan, **changes}), objectives, made, run, ranks=ranks
        )
        state = {str(i): rule.state_dict() for i, rule in enumerate(made)}
        buffers = dict(model.named_buffers())
        parameters = {name: whole(value).detach() for name, value in model.named_parameters()}
        torch.save({"rules": state, "buffers": buffers, "parameters": parameters}, run / f"of-rank-{ranks.rank}.pt")
        return result


def cut_back(run: Path, copy: Path, step: int) -> Path:
    """The run as it was when the checkpoint of `step` had just been written."""
    shutil.copytree(run, copy)
    for ended in ("done.json", HASHES):
        (copy / ended).unlink()
    for path in (copy / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    return copy


def losses(run: Path) -> torch.Tensor:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([line.get("total_loss") or line["eval"]["loss"] for line in lines], dtype=torch.float64)


def weights(run: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    path = run / "checkpoints" / f"step-{step:08d}"
    return {f"{kind} {k}": v for kind in ("model", "optimizer") for k, v in read_tensors(path, kind).items()}


def require_close(run: Path, other: Path) -> None:
    torch.testing.assert_close(losses(run), losses(other), **FLOAT32)
    mine, theirs = weights(run), weights(other)
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.fixture(scope="module")
def on_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("one") / "run"
    go(0, run)
    return run


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    in_ranks(2, partial(go, run=folder / "run"), folder / "meeting")
    return folder / "run"


def test_a_run_on_two_ranks_is_that_of_one_process(on_one: Path, on_two: Path) -> None:
    require_close(on_two, on_one)
    one, two = (json.loads((run / "done.json").read_text()) for run in (on_one, on_two))
    assert one["params_total"] == two["params_total"] and one["flops"] == two["flops"]
    assert one["params_active"] == pytest.approx(two["params_active"], rel=1e-12)
    assert json.loads((on_two / "environment.json").read_text())[0]["ranks"] == 2


def test_one_process_reads_what_two_ranks_wrote(on_two: Path) -> None:
    """Its own pieces while it goes on, one file of the model when it is over."""
    files = {path.name for path in (on_two / "checkpoints" / "step-00000004").iterdir()}
    assert {"model.safetensors", "optimizer-00000.safetensors", "optimizer-00001.safetensors"} <= files
    model, _ = SYSTEMS["hmoe"]()
    load_weights(model, on_two / "checkpoints" / f"step-{STEPS:08d}")
    left = torch.load(on_two / "of-rank-0.pt")["parameters"]
    assert all(torch.equal(parameter, left[name]) for name, parameter in model.named_parameters())


def test_two_ranks_go_on_to_the_bit(on_two: Path, tmp_path: Path) -> None:
    again = cut_back(on_two, tmp_path / "again", 2)
    in_ranks(2, partial(go, run=again), tmp_path / "meeting")
    assert timeless(again) == timeless(on_two)
    mine, theirs = weights(again), weights(on_two)
    assert all(torch.equal(mine[name], value) for name, value in theirs.items())


def test_saved_on_two_resumed_on_one(on_two: Path, tmp_path: Path) -> None:
    again = cut_back(on_two, tmp_path / "again", 2)
    go(0, again)
    require_close(again, on_two)


def test_saved_on_one_resumed_on_two_then_sharded_otherwise(on_one: Path, tmp_path: Path) -> None:
    again = cut_back(on_one, tmp_path / "again", 2)
    in_ranks(2, partial(go, run=again, parallel=ParallelSettings("none", timeout_s=60)), tmp_path / "meeting")
    require_close(again, on_one)


@pytest.mark.slow
def test_saved_on_two_resumed_on_four(on_two: Path, tmp_path: Path) -> None:
    again = cut_back(on_two, tmp_path / "again", 2)
    hybrid = ParallelSettings("hybrid", replicas=2, timeout_s=60)
    in_ranks(4, partial(go, run=again, parallel=hybrid), tmp_path / "meeting")
    require_close(again, on_two)


@pytest.mark.parametrize("policy", ["keep", "mean", "fresh"])
def test_adaptation_in_step(tmp_path: Path, policy: str) -> None:
    """DynMoE's experts come and go on every rank as in one process, and rules' states are the same to the bit."""
    work = partial(go, system="dynmoe", rules=partial(adapting, policy))
    in_ranks(2, partial(work, run=tmp_path / "two"), tmp_path / "meeting")
    work(0, run=tmp_path / "one")
    zero, one, alone = (
        torch.load(tmp_path / path) for path in ("two/of-rank-0.pt", "two/of-rank-1.pt", "one/of-rank-0.pt")
    )
    for kind in ("rules", "buffers", "parameters"):
        require_equal(zero[kind], one[kind])
    available = [name for name in alone["buffers"] if "available" in name]
    assert [int(alone["buffers"][name].sum()) for name in available] == [3, 4]
    for name in available:
        assert torch.equal(zero["buffers"][name], alone["buffers"][name]), name
    for name, value in alone["parameters"].items():
        torch.testing.assert_close(zero["parameters"][name], value, rtol=1e-3, atol=1e-4, msg=name)


def adapting(policy: Any) -> list[Rule]:
    return [Muting(), AdaptiveExperts(every=3, window=2, new_experts=policy, seed=1)]


class Muting(Rule):
    """Makes expert 1 out of reach, so that adaptation removes it; in the first layer the others serve every token, in
    the second some have none, and the removed expert's slot gets a new one."""

    def start(self, model: Any, optimizer: Any) -> None:
        for number, layer in enumerate(model.moe_layers().values()):
            for expert in range(4):
                write_rows(layer.router.select.thresholds, expert, 100.0 if expert == 1 else 9.0 * (number - 1) + 0.05)


def require_equal(tree: Any, other: Any) -> None:
    if isinstance(tree, dict):
        assert tree.keys() == other.keys()
        for key in tree:
            require_equal(tree[key], other[key])
    elif isinstance(tree, list):
        for left, right in zip(tree, other, strict=True):
            require_equal(left, right)
    else:
        assert torch.equal(tree, other) if isinstance(tree, torch.Tensor) else tree == other


def stopped(rank: int, run: Path) -> None:
    with pytest.raises(TrainingStopped, match="SIGTERM" if rank else "another rank"):
        go(rank, run, rules=partial(signalling, rank))


def signalling(rank: int) -> list[Rule]:
    return [Signal(rank)]


class Signal(Rule):
    """SIGTERM to rank 1 in step 3."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def apply(self, step: int) -> None:
        if self.rank == 1 and step == 3:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_to_one_rank_stops_all_once_they_saved(tmp_path: Path) -> None:
    in_ranks(2, partial(stopped, run=tmp_path / "run"), tmp_path / "meeting")
    assert (tmp_path / "run" / "checkpoints" / "step-00000003" / "state.json").exists()
    assert not (tmp_path / "run" / "done.json").exists()


def test_a_damaged_piece_is_named(on_two: Path, tmp_path: Path) -> None:
    again = cut_back(on_two, tmp_path / "again", STEPS)
    flip_last_bit(again / "checkpoints" / "step-00000006" / "optimizer-00001.safetensors")
    with pytest.raises(CheckpointError, match=r"optimizer-00001\.safetensors has sha256.*step-00000004 is intact"):
        go(0, again)


def not_finite(rank: int, run: Path) -> None:
    with pytest.raises(Diverged, match="step 2"):
        go(rank, run, rules=partial(broken, rank))


def broken(rank: int, step: int = 2) -> list[Rule]:
    return [Breaking(rank, step)]


class Breaking(Rule):
    """An infinite gradient on rank 1 alone, in one step."""

    def __init__(self, rank: int, step: int) -> None:
        self.rank, self.step = rank, step

    def start(self, model: Any, optimizer: Any) -> None:
        self.model = model

    def gradients(self, step: int) -> None:
        if self.rank == 1 and step == self.step:
            next(self.model.parameters()).grad.to_local()[0] = float("inf")


def test_what_is_not_finite_on_one_rank_ends_all(tmp_path: Path) -> None:
    in_ranks(2, partial(not_finite, run=tmp_path / "run"), tmp_path / "meeting")


def ended_while_saving(rank: int, run: Path) -> None:
    def slowly(path: Path, tensors: Any) -> str:
        time.sleep(0.5)
        return write_tensors(path, tensors)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Diverged, match="step 3"):
        patch.setattr("moestro.parallel.storage.write_tensors", slowly)
        go(rank, run, rules=partial(broken, rank, 3))


def test_what_was_being_saved_when_a_run_ended_is_saved(tmp_path: Path) -> None:
    in_ranks(2, partial(ended_while_saving, run=tmp_path / "run"), tmp_path / "meeting")
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert read_state(saved)["step"] == 2


def test_any_seed_will_do() -> None:
    ranks = [Ranks(torch.device("cpu"), rank=rank, world=2) for rank in range(2)]
    with torch.random.fork_rng(devices=[]):
        drawn = []
        for seed, each in product((0, 2**31 - 1, 2**63), ranks):
            each.seed_step(seed, 5)
            drawn.append(float(torch.rand(())))
    assert len(set(drawn)) == 6


def test_a_model_half_joined_is_whole_all_the_time(tmp_path: Path) -> None:
    in_ranks(2, partial(stopped, run=tmp_path / "run"), tmp_path / "meeting")
    pieces = tmp_path / "run" / "checkpoints" / "step-00000003"
    before = read_tensors(pieces, "model")

    def killed(*args: object, **keywords: object) -> None:
        raise KeyboardInterrupt

    for cut in ("os.replace", "write_text", "Path.unlink"):
        path = shutil.copytree(pieces, tmp_path / cut / pieces.name)
        assert len(list(path.glob("model-*"))) == 2
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(f"moestro.train.checkpoint.{cut}", killed)
            join_model(path)
        for _ in range(2):
            read_state(path)
            now = read_tensors(path, "model")
            assert all(torch.equal(now[name], value) for name, value in before.items())
            join_model(path)
        assert [file.name for file in path.glob("model*")] == ["model.safetensors"]


def test_shares_must_be_equal(tmp_path: Path) -> None:
    ranks = Ranks(torch.device("cpu"), rank=0, world=3)
    with pytest.raises(ValueError, match=r"batch_size=8 in accumulate=1 micro-batches cannot be shared by 3 ranks"):
        train(SYSTEMS["dense"]()[0], Counting(), tiny_settings(batch_size=8), [], [], tmp_path, ranks=ranks)

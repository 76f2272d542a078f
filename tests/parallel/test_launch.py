"""`moestro train --nproc`: several ranks of one host, a rank that is killed, errors that are told once."""

import json
import os
import signal
from pathlib import Path

import pytest

from tests.parallel.runs import command, ranks_of, saved, start, until, write_recipe


@pytest.mark.slow
def test_a_killed_rank_is_replaced_and_training_continues_by_itself(tmp_path: Path) -> None:
    recipe, run, log = write_recipe(tmp_path, steps=120), tmp_path / "run", tmp_path / "log"
    training = start(command(recipe, run, "--nproc", "2", "--max-restarts", "3"), log)
    until(lambda: saved(run), 120, "the first checkpoint")
    os.kill(ranks_of(run)[1], signal.SIGKILL)
    assert training.wait(300) == 0, log.read_text()
    sessions = json.loads((run / "environment.json").read_text())
    assert len(sessions) >= 2 and sessions[0]["from_step"] == 0 and sessions[-1]["from_step"] >= 10
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == list(range(1, 121)) and json.loads((run / "done.json").read_text())["step"] == 120


@pytest.mark.slow
def test_a_killed_rank_without_restarts_is_told_once(tmp_path: Path) -> None:
    recipe, run, log = write_recipe(tmp_path, steps=2000), tmp_path / "run", tmp_path / "log"
    training = start(command(recipe, run, "--nproc", "2"), log)
    until(lambda: saved(run), 120, "the first checkpoint")
    os.kill(ranks_of(run)[0], signal.SIGKILL)
    assert training.wait(120) == 1
    assert "was ended by SIGKILL" in log.read_text() or "lost another rank" in log.read_text()
    assert "Traceback" not in log.read_text()


@pytest.mark.slow
def test_sigterm_saves_on_all_ranks(tmp_path: Path) -> None:
    recipe, run, log = write_recipe(tmp_path, steps=20000), tmp_path / "run", tmp_path / "log"
    training = start(command(recipe, run, "--nproc", "2"), log)
    until(lambda: saved(run), 120, "the first checkpoint")
    before = saved(run)[-1]
    training.send_signal(signal.SIGTERM)
    assert training.wait(60) == 0
    assert log.read_text().count("stopped by SIGTERM, saved") == 1 and saved(run)[-1] >= before
    assert not ranks_of(run)


@pytest.mark.slow
def test_a_mistake_in_a_recipe_is_told_once(tmp_path: Path) -> None:
    recipe, run, log = write_recipe(tmp_path, steps=5), tmp_path / "run", tmp_path / "log"
    words = [*command(recipe, run, "train.accumulate=4"), "--nproc", "2"]
    assert start(words, log).wait(120) == 1
    assert log.read_text().count("moestro: error") == 1
    assert "cannot be shared by 2 ranks" in log.read_text() and "Traceback" not in log.read_text()
    assert start([*command(recipe, run, "parallel.sharding=half"), "--nproc", "2"], log).wait(120) == 2
    assert log.read_text().count("moestro: error") == 1 and "allowed" in log.read_text()

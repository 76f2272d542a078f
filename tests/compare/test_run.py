"""A whole comparison: equal compute, same data, resumed after a kill without running anything twice."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from moestro.compare.board import Board
from moestro.compare.job import last_flops
from moestro.compare.run import compare
from tests.compare.comparisons import COMPARISON, write_comparison


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, Path, dict]:
    """A comparison that has run: its file, its folder, its results."""
    folder = tmp_path_factory.mktemp("comparison")
    path = write_comparison(folder)
    out = folder / "out"
    return path, out, compare(path, out, workers=1, board=quiet(), command="moestro compare tiny.yaml")


def quiet() -> Board:
    return Board(Console(quiet=True))


def test_every_run_used_the_budget_and_no_more_than_one_step_over_it(finished):
    _, _, results = finished
    assert [(run["arm"], run["status"]) for run in results["runs"]] == [("dense", "done"), ("moe", "done")]
    for run in results["runs"]:
        step = run["flops"] / run["tokens"] * 2 * 16
        assert 3e7 <= run["flops"] < 3e7 + 1.5 * step
        assert run["flops_computed"] > run["flops"]
        assert run["used_flops_per_token"] == pytest.approx(run["expected_flops_per_token"], rel=0.2)


def test_results_on_disk_are_those_returned_and_the_page_stands_beside_them(finished):
    _, out, results = finished
    assert json.loads((out / "results.json").read_text()) == results
    page = (out / "report.html").read_text()
    assert results["winner"]["sentence"].split(" ")[0] in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page


def test_both_arms_saw_the_same_text_in_the_same_order(finished):
    _, _, results = finished
    folders = [Path(run["run_dir"]) for run in results["runs"]]
    states = [json.loads(next((f / "checkpoints").iterdir()).joinpath("state.json").read_text()) for f in folders]
    assert states[0]["data"] == states[1]["data"]
    assert results["runs"][0]["final"]["bytes"] == results["runs"][1]["final"]["bytes"]


def test_figures_of_experts_and_text_are_there(finished):
    _, _, results = finished
    dense, moe = results["runs"]
    assert dense["routing"] == {}
    assert len(moe["routing"]["blocks.0.ffn"]["load"]) == 4
    assert set(results["sample"]) == {"dense", "moe"}
    assert "".join(token["text"] for token in results["sample"]["moe"])
    assert moe["curve"][-1]["bpb"] > 0


def test_finished_runs_are_not_run_again(finished):
    path, out, results = finished
    before = {file: file.stat().st_mtime_ns for file in out.glob("runs/*/*/metrics.jsonl")}
    again = compare(path, out, workers=1, board=quiet(), command="moestro compare tiny.yaml")
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert again["runs"] == results["runs"]


def test_a_failed_run_is_reported_and_the_others_go_on(tmp_path):
    text = COMPARISON.replace("moe.yaml,", "moe.yaml, set: {optim.lr: 1.0e+30, optim.clip: null},")
    results = compare(write_comparison(tmp_path, text), tmp_path / "out", workers=1, board=quiet())
    dense, moe = results["runs"]
    assert dense["status"] == "done"
    assert moe["status"] == "failed"
    assert "NonFiniteLoss" in moe["error"]


def test_the_last_complete_line_tells_the_progress(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    assert last_flops(metrics) == 0.0
    metrics.write_text('{"step": 1, "flops": 5.0}\n{"step": 1, "eval": {}}\n{"step": 2, "fl')
    assert last_flops(metrics) == 5.0


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_as_if_it_had_not_been(finished, tmp_path):
    _, _, want = finished
    path = write_comparison(tmp_path)
    script = (
        "import sys; from moestro.compare.run import compare\n"
        f"if __name__ == '__main__': compare({str(path)!r}, {str(tmp_path / 'out')!r}, workers=2)"
    )
    program = tmp_path / "run.py"
    program.write_text(script)
    for wait in (6.0, 8.0, 9.0):
        process = subprocess.Popen([sys.executable, program], start_new_session=True, stderr=subprocess.DEVNULL)
        time.sleep(wait)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    have = compare(path, tmp_path / "out", workers=1, board=quiet())
    for before, after in zip(want["runs"], have["runs"], strict=True):
        assert after["final"] == before["final"]
        assert after["curve"] == before["curve"]
        assert after["train_curve"] == before["train_curve"]

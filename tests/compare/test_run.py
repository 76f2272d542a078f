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
from moestro.compare.job import Job, last_flops, run_job
from moestro.compare.match import match, reference_size
from moestro.compare.plan import load_comparison
from moestro.compare.results import CURVE_POINTS, thinned
from moestro.compare.run import compare, plan_jobs
from moestro.recipe.build import build_data
from moestro.recipe.load import load_recipe
from moestro.recipe.syntax import RecipeError
from tests.compare.comparisons import COMPARISON, write_comparison


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, Path, dict]:
    """A comparison that has run: its file, its folder, its results."""
    folder = tmp_path_factory.mktemp("comparison")
    path = write_comparison(folder)
    out = folder / "out"
    return path, out, compare(path, out, workers=1, board=quiet(), command="moestro compare tiny.yaml")


def test_hours_that_remain_are_hours() -> None:
    board = quiet()
    board.begun, board.share_begun = time.monotonic() - 3725, 0.0
    assert board.remaining(0.5) == "about 1:02:05 remaining"


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


def test_arms_differ_in_nothing_that_orders_the_text_and_seeds_differ(tmp_path):
    """Batches are a pure function of data, batch size and seed (tests/data)."""
    plan = load_comparison(write_comparison(tmp_path), ("seeds=[3, 4]",))
    size = reference_size(plan, 16, 257)
    matches = {(arm, size.name): match(plan, arm, size, 257) for arm in plan.arms}
    jobs = list(plan_jobs(plan, {3e7: [size]}, matches, tmp_path / "out", "cpu"))
    recipes = [load_recipe(job.recipe, job.settings) for job in jobs]
    assert [(job.arm, job.seed) for job in jobs] == [("dense", 3), ("moe", 3), ("dense", 4), ("moe", 4)]
    assert [recipe.train.value("seed") for recipe in recipes] == [3, 3, 4, 4]
    assert len({recipe.train.value("batch_size") for recipe in recipes}) == 1
    assert all(recipe.tree["data"] == recipes[0].tree["data"] for recipe in recipes)
    assert len({job.folder for job in jobs}) == 4


def test_a_recipe_that_is_edited_while_its_run_goes_on_is_not_taken_for_the_one_trained(tmp_path, monkeypatch):
    path = load_comparison(write_comparison(tmp_path)).recipe_path("dense")
    job = Job("dense", "d16", 3e7, 0, path, (), tmp_path, 1.0, 1, None, False)

    def train(job: Job) -> dict:
        job.recipe.write_text(job.recipe.read_text().replace("lr: 2e-3", "lr: 9e-3"))
        return {}

    monkeypatch.setattr(Job, "train", train)
    monkeypatch.setattr(Job, "measure", lambda job: {})
    assert run_job(job)["question"]["recipe"]["optim"]["lr"] == 2e-3
    with pytest.raises(RecipeError, match="recipe.optim.lr was 0.002, now 0.009"):
        job.check_same()


def test_final_figures_are_of_the_tokens_asked_for(finished):
    path, out, results = finished
    folder = Path(results["runs"][0]["run_dir"])
    plan = load_comparison(path)
    dataset = build_data(plan.recipe("dense")).prepare(progress=False)
    assert results["runs"][0]["final"]["tokens"] == dataset.n_val_tokens
    job = Job("dense", "d8", 3e7, 0, plan.recipe_path("dense"), settings_of(folder), folder, 1.0, 1, 64, False)
    assert job.measure()["final"]["tokens"] < dataset.n_val_tokens


def settings_of(folder: Path) -> tuple[str, ...]:
    """The settings that make a recipe the one of a run folder."""
    tree = load_recipe(folder / "recipe.yaml").tree
    return tuple(f"{section}={json.dumps(tree[section])}" for section in ("model", "train"))


def test_finished_runs_of_other_settings_are_refused_not_reported_as_new(finished):
    path, out, results = finished
    for change, name in (("common.optim.lr=0.25", "recipe.optim.lr was 0.002, now 0.25"), ("final_tokens=64", "final")):
        with pytest.raises(RecipeError, match=f"holds a finished run of another comparison: .*{name}"):
            compare(path, out, (change,), workers=1, board=quiet())
    assert json.loads((out / "results.json").read_text()) == results


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
    assert "Diverged" in moe["error"]


@pytest.mark.parametrize("n", [1, CURVE_POINTS, CURVE_POINTS + 1, 2 * CURVE_POINTS - 1, 7 * CURVE_POINTS])
def test_curves_have_few_points_the_last_among_them(n):
    steps = [{"step": step} for step in range(n)]
    kept = thinned(steps)
    assert kept[-1] is steps[-1] and min(n, CURVE_POINTS // 2) <= len(kept) <= CURVE_POINTS


def test_the_last_complete_line_tells_the_progress(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    assert last_flops(metrics) == 0.0
    metrics.write_text('{"step": 1, "flops": 5.0}\n{"step": 1, "eval": {}}\n{"step": 2, "fl')
    assert last_flops(metrics) == 5.0


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_a_signal_saves_what_runs_starts_nothing_new_and_reports_what_is_done(tmp_path, number):
    path, out = write_comparison(tmp_path), tmp_path / "out"
    settings = ["budgets=[6e8]", "sizes.tokens_per_parameter=[0.8]"]
    command = [sys.executable, "-m", "moestro", "compare", str(path), *settings, "--out", str(out), "--workers", "1"]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    running = out / "runs" / "dense"
    while process.poll() is None and not any(f.stat().st_size for f in running.glob("*/metrics.jsonl")):
        time.sleep(0.05)
    assert process.poll() is None, process.stderr.read()
    # as a terminal does: to the whole group, of which the workers are not part
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert "every run in progress is saved; the same command continues" in errors
    assert "Traceback" not in errors
    assert process.returncode == 130
    results = json.loads((out / "results.json").read_text())
    assert [run["status"] for run in results["runs"]] == ["unfinished", "unfinished"]
    assert list(running.glob("*/checkpoints/step-*"))
    assert not (out / "runs" / "moe").exists()


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
    assert [run.get("error") for run in have["runs"]] == [None, None]
    for before, after in zip(want["runs"], have["runs"], strict=True):
        assert after["final"] == before["final"]
        assert after["curve"] == before["curve"]
        assert after["train_curve"] == before["train_curve"]

"""The whole of one comparison: solve the sizes, run every arm, write results and report. Finished runs are kept."""

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moestro.compare.board import Board
from moestro.compare.job import Job, run_job
from moestro.compare.match import Match, Size, match, sizes
from moestro.compare.plan import Comparison, load_comparison
from moestro.compare.report import write_report
from moestro.compare.results import collect
from moestro.recipe.build import build_data
from moestro.train.durable import write_json
from moestro.train.signals import TrainingStopped

CONTINUE = "the same command continues from here"


def compare(
    path: str | Path,
    out: str | Path,
    overrides: Sequence[str] = (),
    workers: int | None = None,
    board: Board | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Run the comparison at `path` in the folder `out`; returns what it wrote to results.json, besides report.html.

    `workers` runs go on at a time, by default as many as the machine has cores for. Runs that finished earlier are not
    run again, interrupted ones continue. A run that fails is reported, the others go on.

    Raises: RecipeError; TrainingStopped after SIGINT or SIGTERM, once every run in progress is saved.
    """
    plan = load_comparison(path, tuple(overrides))
    board = board or Board()
    dataset = build_data(plan.recipe(plan.reference)).prepare(progress=True)
    by_budget = {budget: sizes(plan, budget, dataset.vocab_size) for budget in plan.budgets}
    all_sizes = sorted({size.name: size for found in by_budget.values() for size in found}.values(), key=_width)
    matches = {(arm, size.name): match(plan, arm, size, dataset.vocab_size) for size in all_sizes for arm in plan.arms}
    jobs = list(plan_jobs(plan, by_budget, matches, Path(out)))
    board.start(jobs, matches, plan)
    failures = run_jobs(jobs, workers or max(1, (os.cpu_count() or 1) // plan.threads), board)
    results = collect(plan, dataset, all_sizes, matches, jobs, failures, command)
    write_json(Path(out) / "results.json", results)
    write_report(results, Path(out) / "report.html")
    return results


def _width(size: Size) -> int:
    return size.d_model


def plan_jobs(
    plan: Comparison, by_budget: Mapping[float, Sequence[Size]], matches: Mapping[tuple[str, str], Match], out: Path
) -> Iterator[Job]:
    """Every run of the plan, seed by seed, so that an early stop leaves complete comparisons behind."""
    for seed in plan.seeds:
        for budget, found in by_budget.items():
            middle = found[len(found) // 2].name
            for size in found:
                for arm in plan.arms:
                    matched = matches[arm, size.name]
                    settings = {**matched.settings, **_training(plan, arm, matched, budget), "train.seed": seed}
                    keys = {**plan.common, **plan.arms[arm].set, **settings}
                    yield Job(
                        arm=arm,
                        size=size.name,
                        budget=budget,
                        seed=seed,
                        recipe=plan.recipe_path(arm),
                        settings=tuple(f"{key}={json.dumps(value)}" for key, value in keys.items()),
                        folder=out / "runs" / arm / f"{size.name}-{budget:.3g}-seed{seed}",
                        expected_token_flops=matched.token_flops,
                        threads=plan.threads,
                        final_tokens=plan.final_tokens,
                        sample=seed == plan.seeds[0] and size.name == middle and budget == max(plan.budgets),
                    )


def _training(plan: Comparison, arm: str, matched: Match, budget: float) -> dict[str, Any]:
    recipe = plan.recipe(arm)
    batch = recipe.train.value("batch_size") * recipe.data.value("seq_len")
    steps = budget / matched.token_flops / batch
    every = max(1, round(steps / plan.evaluations))
    return {
        "train.budget.flops": budget,
        "train.eval_every": every,
        "train.save_every": 2 * every,
        "train.keep_best": False,
    }


def run_jobs(jobs: Sequence[Job], workers: int, board: Board) -> dict[str, str]:
    """Run what is not finished, `workers` at a time; returns the error of every run that failed."""
    open_jobs = [job for job in jobs if job.summary is None]
    failures: dict[str, str] = {}
    if not open_jobs:
        return failures
    context = multiprocessing.get_context("spawn")
    with board, ProcessPoolExecutor(min(workers, len(open_jobs)), mp_context=context) as pool, _stopping(pool):
        running = {pool.submit(run_job, job): job for job in open_jobs}
        while running:
            done, _ = wait(running, timeout=board.interval, return_when=FIRST_COMPLETED)
            for future in done:
                _finish(future, running.pop(future), failures, board)
            board.refresh()
    return failures


def _finish(future: Future, job: Job, failures: dict[str, str], board: Board) -> None:
    try:
        board.finished(job, future.result())
    except BrokenProcessPool as error:
        raise RuntimeError(f"a worker process died (killed, or out of memory); {CONTINUE}") from error
    except TrainingStopped as error:
        raise TrainingStopped(f"stopped, every run in progress is saved; {CONTINUE}") from error
    except Exception as error:  # a failed run is a result: it is reported, and the others go on
        failures[job.name] = f"{type(error).__name__}: {error}"
        board.failed(job, failures[job.name])


@contextmanager
def _stopping(pool: ProcessPoolExecutor) -> Iterator[None]:
    """Hand SIGTERM and SIGINT on to the workers, which save and stop, and start nothing new."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        for child in multiprocessing.active_children():
            if child.pid is not None:
                os.kill(child.pid, signal.SIGTERM)
        pool.shutdown(wait=False, cancel_futures=True)
        raise TrainingStopped(f"stopped, every run in progress is saved; {CONTINUE}")

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

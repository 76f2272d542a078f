"""The whole of one comparison: solve the sizes, run every arm, write results and report. Finished runs are kept."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from moestro.compare.board import Board
from moestro.compare.job import Job, run_job
from moestro.compare.match import Match, Size, match, sizes
from moestro.compare.plan import Comparison, budget_name, load_comparison
from moestro.compare.report import write_report
from moestro.compare.results import collect
from moestro.ops.cores import own_cores
from moestro.ops.whole_files import holding
from moestro.recipe.build import build_data, build_training
from moestro.train.durable import write_json
from moestro.train.folder_job import FolderInUse
from moestro.train.signals import TrainingStopped

CONTINUE = "the same command continues from here"
STOPPED = f"stopped, every run in progress is saved; {CONTINUE}"
# prctl option of Linux: the signal a process gets when its parent dies (sys/prctl.h)
_PR_SET_PDEATHSIG = 1


def compare(
    path: str | Path,
    out: str | Path,
    overrides: Sequence[str] = (),
    workers: int | None = None,
    board: Board | None = None,
    command: str = "",
    device: str = "cpu",
) -> dict[str, Any]:
    """Run the comparison at `path` in the folder `out`; returns what it wrote to results.json, besides report.html.

    `workers` runs go on at a time, by default as many as this process has cores for. Runs that finished earlier are not
    run again, interrupted ones continue. A run that fails is reported, the others go on. Stopped early, it writes the
    results and the report of what has finished.

    Raises: RecipeError, also where the folder holds finished runs of other settings; FolderInUse where another
    comparison goes on in it; TrainingStopped after SIGINT or SIGTERM, once every run in progress is saved.
    """
    plan, out = load_comparison(path, tuple(overrides)), Path(out)
    board = board or Board()
    for arm in plan.arms:
        with plan.blamed(arm):
            build_training(plan.recipe(arm))
    dataset = build_data(plan.recipe(plan.reference)).prepare(progress=True)
    by_budget = {budget: sizes(plan, budget, dataset.vocab_size) for budget in plan.budgets}
    all_sizes = sorted({size.name: size for found in by_budget.values() for size in found}.values(), key=_width)
    matches = {(arm, size.name): match(plan, arm, size, dataset.vocab_size) for size in all_sizes for arm in plan.arms}
    jobs = list(plan_jobs(plan, by_budget, matches, out, device))
    for job in jobs:
        job.check_same()
    with holding(out, FolderInUse(out)):
        board.start(jobs, announcement(plan, all_sizes))
        failures: dict[str, str] = {}
        try:
            run_jobs(jobs, workers or default_workers(plan, device), board, failures)
        finally:
            results = collect(plan, dataset, all_sizes, matches, jobs, failures, command)
            write_json(out / "results.json", results)
            write_report(results, out / "report.html")
    return results


def announcement(plan: Comparison, all_sizes: Sequence[Size]) -> str:
    """What is compared, in a line."""
    return (
        f"{len(plan.arms)} arms ({', '.join(plan.arms)}), sizes {', '.join(size.name for size in all_sizes)}, seeds "
        f"{', '.join(map(str, plan.seeds))}, {', '.join(map(budget_name, plan.budgets))} useful training FLOPs each"
    )


def default_workers(plan: Comparison, device: str) -> int:
    """Runs at a time: as many as there are cores for; one on an accelerator."""
    return max(1, own_cores() // plan.threads) if device == "cpu" else 1


def _width(size: Size) -> int:
    return size.d_model


def plan_jobs(
    plan: Comparison,
    by_budget: Mapping[float, Sequence[Size]],
    matches: Mapping[tuple[str, str], Match],
    out: Path,
    device: str,
) -> Iterator[Job]:
    """Every run of the plan, seed by seed, so that an early stop leaves complete comparisons behind."""
    for seed in plan.seeds:
        for budget, found in by_budget.items():
            middle = found[len(found) // 2].name
            for size in found:
                for arm in plan.arms:
                    matched = matches[arm, size.name]
                    settings = {**matched.settings, **_training(plan, arm, matched, budget), "train.seed": seed}
                    yield Job(
                        arm=arm,
                        size=size.name,
                        budget=budget,
                        seed=seed,
                        recipe=plan.recipe_path(arm),
                        settings=tuple(plan.overrides(arm, settings)),
                        folder=out / "runs" / arm / f"{size.name}-{budget_name(budget)}-seed{seed}",
                        expected_token_flops=matched.token_flops,
                        threads=plan.threads,
                        final_tokens=plan.final_tokens,
                        device=device,
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


def run_jobs(jobs: Sequence[Job], workers: int, board: Board, failures: dict[str, str]) -> None:
    """Run what is not finished, `workers` at a time; the error of every run that fails goes to `failures`.

    No more runs are handed to the workers than they can begin at once: what has been handed over cannot be recalled.
    """
    waiting = [job for job in jobs if job.summary is None]
    if not waiting:
        return
    context = multiprocessing.get_context("spawn")
    pool_of = partial(ProcessPoolExecutor, workers, context, initializer=follow_parent, initargs=(os.getpid(),))
    with board, pool_of() as pool, _stopping():
        running: dict[Future, Job] = {}
        while waiting or running:
            while waiting and len(running) < workers:
                job = waiting.pop(0)
                running[pool.submit(run_job, job)] = job
            done, _ = wait(running, timeout=board.interval, return_when=FIRST_COMPLETED)
            for future in done:
                _finish(future, running.pop(future), failures, board)
            board.refresh()


def follow_parent(parent: int) -> None:
    """Make this worker deaf to the terminal, which speaks to the parent, and let it die with the parent: a run that is
    killed continues from its last checkpoint."""
    os.setsid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        # it may have died before this worker could ask for the signal
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)


def _finish(future: Future, job: Job, failures: dict[str, str], board: Board) -> None:
    try:
        board.finished(job, future.result())
    except BrokenProcessPool as error:
        raise RuntimeError(f"a worker process died (killed, or out of memory); {CONTINUE}") from error
    except TrainingStopped as error:
        raise TrainingStopped(STOPPED) from error
    except Exception as error:  # a failed run is a result: it is reported, and the others go on
        failures[job.name] = f"{type(error).__name__}: {error}"
        board.failed(job, failures[job.name])


@contextmanager
def _stopping() -> Iterator[None]:
    """Hand SIGTERM and SIGINT on to the workers, which save and stop, and start nothing new."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        for child in multiprocessing.active_children():
            if child.pid is not None:
                os.kill(child.pid, signal.SIGTERM)
        raise TrainingStopped(STOPPED)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

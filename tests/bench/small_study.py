"""A study of compression in little: every arm trained once, and its probes asked."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.effects.study import Study, Work
from moestro.compare.board import Board


def small_runs(study: Study, folder: Path) -> Mapping[int, Mapping[str, Any]]:
    """{seed: {arm: what its run and its probes say}} of one seed."""
    small = {**study.common, "model.d_model": 32, "model.attention.n_heads": 2, "train.batch_size": 4}
    quick = replace(study, common=small, budget=2e10).quick()
    work = Work(replace(quick, seeds=(0,)), folder / "study", folder)
    work.train(workers=1, board=Board(Console(quiet=True)))
    return {0: {job.arm: job.summary for job in work.jobs}}

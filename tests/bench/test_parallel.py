"""Bytes that a rank sends in a real step of two processes are those that a plan foresees."""

from pathlib import Path

import pytest

from bench.parallel import CASES, counted, spread_of
from moestro.plan import StepTime


@pytest.mark.parametrize("case", [CASES[2], CASES[5]], ids=lambda case: case.name)
def test_formulas_foresee_what_is_counted(case, tmp_path: Path):
    foreseen, found = StepTime(spread_of(case)).sent, counted(case, tmp_path)
    assert sum(found.values()) == pytest.approx(sum(foreseen.values()), rel=0.05)
    assert found["reduce_scatter"] == pytest.approx(foreseen["reduced gradients"], rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_is_foreseen(case, tmp_path: Path):
    assert sum(counted(case, tmp_path).values()) == pytest.approx(
        sum(StepTime(spread_of(case)).sent.values()), rel=0.05
    )

"""Foreseen step times: every case can be planned, and a measured machine is one that `moestro plan` reads."""

from dataclasses import replace
from pathlib import Path

import pytest

from bench.step_time import CASES, Case
from bench.this_machine import as_yaml
from moestro.plan import MACHINES, machine_named

CPU = replace(MACHINES["h200"], name="CPU", overlap=0.0, sharded_unit=1e-3)


def test_what_is_printed_is_what_a_plan_reads(tmp_path: Path) -> None:
    (tmp_path / "here.yaml").write_text(as_yaml(CPU))
    assert machine_named(str(tmp_path / "here.yaml")) == CPU


@pytest.mark.parametrize("case", [CASES[0], CASES[7], CASES[11]], ids=lambda case: case.name)
def test_cases_are_planned(case: Case) -> None:
    time = case.foreseen(CPU)
    assert 0 < time.optimizer < time.compute and (time.waiting > 0) is (case.world > 1)

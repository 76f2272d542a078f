"""Cores that a process has."""

import os
from pathlib import Path

import pytest

from moestro.compare.plan import load_comparison
from moestro.compare.run import default_workers
from moestro.ops.cores import own_cores
from tests.conftest import ROOT


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes are bound to cores on Linux only")
def test_a_process_that_is_bound_to_a_core_has_one() -> None:
    everything = os.sched_getaffinity(0)
    assert own_cores() == len(everything)
    plan = load_comparison(sorted(Path(ROOT / "recipes" / "compare").glob("*.yaml"))[0])
    try:
        os.sched_setaffinity(0, {min(everything)})
        assert own_cores() == default_workers(plan, "cpu") == 1
    finally:
        os.sched_setaffinity(0, everything)

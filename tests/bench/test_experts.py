"""The contestants of the benchmarks compute what our layer computes; ratios point the way that the tables say."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from bench.experts import TRANSFORMERS
from bench.harness import clock, compare, rate
from bench.hmoe import Shape, both, contestants, decoding, output, shapes
from tests.ops.triton_cases import why_not
from tests.tolerances import FLOAT32

ROOT = Path(__file__).resolve().parents[2]
SMALL = Shape("small", 16, 2, [8, 24, 16, 40])


def test_contestants_give_our_answer_and_our_gradients():
    torch.manual_seed(0)
    moe = SMALL.layer(torch.float32)
    peers = contestants(moe, ("eager", "grouped_mm", "batched_mm"))
    assert len(peers) == (6 if find_spec(TRANSFORMERS) else 3)
    x = torch.randn(20, 16, requires_grad=True)
    want, (dx, *rest) = output(moe, x), both(moe, [x])()
    want_router = rest[[name for name, _ in moe.named_parameters()].index("router.score.weight")]
    for name, module in peers.items():
        torch.testing.assert_close(output(module, x), want, msg=name, **FLOAT32)
        found = both(module, [x])()
        torch.testing.assert_close(found[0], dx, msg=name, **FLOAT32)
        torch.testing.assert_close(found[-1], want_router, msg=name, **FLOAT32)


def test_shapes_are_those_of_the_page():
    equal, unequal, paper = shapes(quick=False)
    assert set(equal.widths) == {512} and set(unequal.widths) == {128, 384, 640, 896}
    assert sum(equal.widths) == sum(unequal.widths) == 32 * 512
    assert (paper.d, paper.widths[0], paper.widths[-1], sum(paper.widths)) == (768, 864, 2208, 12_288)


def test_decoding_rows_are_in_microseconds():
    torch.manual_seed(0)
    rows = decoding(SMALL, torch.float32, tokens=1, rounds=2)
    assert {row.unit for row in rows} == {"us"} and "loop over slices" not in {row.peer for row in rows}


def test_ratios_above_one_mean_that_ours_is_better():
    times = {"ours": [2.0, 2.0], "slow": [6.0, 4.0]}
    (row,) = compare("case", "what", times, unit="us")
    assert (row.ours, row.theirs, row.ratio) == (2000.0, 5000.0, 2.5)
    (row,) = rate("case", "what", times, {"ours": 4e6, "slow": 4e6})
    assert (row.ours, row.unit, row.ratio) == (2.0, "GFLOP/s", 2.5)


def test_warm_up_is_not_timed():
    calls = []
    times = clock({"ours": lambda: None}, rounds=3, timed=lambda run: calls.append(run) or float(len(calls)), warm_up=2)
    assert times == {"ours": [3.0, 4.0, 5.0]}


@pytest.mark.slow
@pytest.mark.skipif(bool(why_not()) or torch.cuda.is_available(), reason=why_not() or "there is a GPU")
def test_the_gpu_script_runs_in_the_interpreter_and_writes_no_times(tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bench.hmoe_gpu", "--quick"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Liger: needs a GPU" in done.stdout and "times above mean nothing" in done.stdout
    refused = subprocess.run([*command, "--json", str(tmp_path / "x.json")], cwd=ROOT, env=environment, text=True)
    assert refused.returncode != 0 and not (tmp_path / "x.json").exists()

"""The benchmark of stock models' experts runs, times every contestant and writes its rows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_quick_benchmark_times_transformers_implementations_beside_ours(tmp_path):
    file = tmp_path / "rows.json"
    command = [sys.executable, "-m", "bench.stock_experts", "--quick", "--threads", "1", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(file.read_text())
    assert (ROOT / result["script"]).is_file()
    rows = result["rows"]
    assert {row["peer"] for row in rows} == {"eager", "grouped_mm", "batched_mm"} and len(rows) == 12
    assert all(row["ours"] > 0 and row["theirs"] > 0 for row in rows)

"""Committed results have the one format, and the pages that quote them quote them exactly."""

import json
import re
from pathlib import Path

import pytest

from bench.summary import summary

ROOT = Path(__file__).resolve().parents[2]
RESULTS = sorted((ROOT / "bench" / "results").glob("*.json"))
PAGE = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
TIMING = {"case", "what", "unit", "ours", "peer", "theirs", "ratio", "spread"}
EFFECT = {"effect", "expected", "measured", "spread", "holds"}


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_results_have_the_one_format(path):
    result = json.loads(path.read_text(encoding="utf-8"))
    assert set(result) == {"script", "commit", "machine", "seed", "rows"}
    assert (ROOT / result["script"]).exists()
    assert re.fullmatch(r"[0-9a-f]{7,40}", result["commit"]), "results of a tree with uncommitted changes prove nothing"
    assert result["rows"]
    assert all(set(row) in (TIMING, EFFECT) for row in result["rows"])


def test_the_performance_page_quotes_results_exactly():
    quoted = re.findall(r"`python -m bench.summary (bench/results/[\w.-]+\.json)`", PAGE)
    assert quoted
    for name in quoted:
        assert summary(ROOT / name) in PAGE, f"the table of {name} is not what the command prints"

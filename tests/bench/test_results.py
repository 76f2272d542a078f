"""Committed results have the one format, and the pages that quote them quote them exactly."""

import json
import re
import subprocess
from pathlib import Path
from shutil import which

import pytest

from bench.summary import summary

ROOT = Path(__file__).resolve().parents[2]
RESULTS = sorted((ROOT / "bench" / "results").glob("*.json"))
EFFECTS = [path for path in RESULTS if path.name.startswith("effects-")]
RELIABILITY = sorted((ROOT / "bench" / "results" / "reliability").glob("*.json"))
FIGURE = {"case", "what", "unit", "value", "wanted", "holds"}
PAGES = {
    name: (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("performance", "avx512", "effects")
}
TIMING = {"case", "what", "unit", "ours", "peer", "theirs", "ratio", "spread"}
STUDY = {"script", "commit", "machine", "seeds", "corpora", "study", "rows", "runs"}
EFFECT = {
    *("effect", "source", "claim", "corpus", "quantity", "arms", "paired"),
    *("expected", "measured", "spread", "interval", "values", "holds"),
}


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_results_have_the_one_format(path):
    result = json.loads(path.read_text(encoding="utf-8"))
    top, row_keys = (STUDY, EFFECT) if path in EFFECTS else ({"script", "commit", "machine", "seed", "rows"}, TIMING)
    assert set(result) == top
    assert (ROOT / result["script"]).exists()
    # a study that was continued names every commit that trained some of it
    commits = result["commit"].split(", ")
    assert all(re.fullmatch("[0-9a-f]{7,40}", one) for one in commits), (
        "results of a tree with uncommitted changes prove nothing"
    )
    assert result["rows"]
    assert all(set(row) == row_keys for row in result["rows"])


@pytest.mark.parametrize("path", EFFECTS, ids=lambda path: path.name)
def test_effects_are_of_several_seeds_at_equal_compute(path):
    result = json.loads(path.read_text(encoding="utf-8"))
    assert len(result["seeds"]) >= 3 and len(result["corpora"]) >= 1
    assert all(len(row["values"]) == len(result["seeds"]) for row in result["rows"])
    flops = [run["flops"] for run in result["runs"]]
    # a run stops with the step that reaches the budget
    assert result["study"]["budget"] <= min(flops) and max(flops) < 1.02 * result["study"]["budget"]


@pytest.mark.parametrize("path", RELIABILITY, ids=lambda path: path.name)
def test_reliability_has_the_one_format_and_its_page_quotes_it(path):
    result = json.loads(path.read_text(encoding="utf-8"))
    assert set(result) == {"script", "commit", "machine", "seed", "figures"}
    assert (ROOT / result["script"]).exists() and re.fullmatch("[0-9a-f]{7,40}", result["commit"])
    assert result["figures"] and all(set(figure) == FIGURE for figure in result["figures"])
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert f"bench/results/reliability/{path.name}" in page
    assert summary(path) in page, f"the table of {path.name} is not what python -m bench.summary prints"


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_every_result_is_quoted_exactly_by_its_page(path):
    page = PAGES["effects" if path in EFFECTS else "avx512" if path.stem.endswith("-avx512") else "performance"]
    assert f"bench/results/{path.name}" in page
    assert summary(path) in page, f"the table of {path.name} is not what python -m bench.summary prints"


@pytest.mark.parametrize("page", PAGES)
def test_pages_quote_committed_results_alone(page):
    quoted = set(re.findall(r"`(bench/[\w/]+\.py)` at commit `(\w+)`", PAGES[page]))
    results = [json.loads(path.read_text(encoding="utf-8")) for path in RESULTS]
    assert quoted <= {(result["script"], result["commit"][:12]) for result in results}


def test_the_page_of_effects_has_no_table_of_an_earlier_run():
    page = PAGES["effects"]
    for path in EFFECTS:
        page = page.replace(summary(path), "")
    assert [line for line in page.splitlines() if line.startswith("|")] == []


@pytest.mark.skipif(which("git") is None, reason="no git")
def test_results_are_of_commits_that_are_in_the_history():
    """A branch that is rebased after it was measured leaves none behind."""
    files = RESULTS + RELIABILITY
    commits = {one for path in files for one in json.loads(path.read_text(encoding="utf-8"))["commit"].split(", ")}
    command = ["git", "merge-base", "--is-ancestor"]
    lost = {one for one in commits if subprocess.run([*command, one, "HEAD"], cwd=ROOT, capture_output=True).returncode}
    if lost == commits:
        pytest.skip("a tree without its history")
    assert not lost

"""`moestro compare`: what it prints and what it exits with."""

import json
import time
from pathlib import Path

import pytest

import moestro.compare.run
from moestro.cli import main
from tests.compare.comparisons import write_comparison


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command of a tiny comparison."""
    folder = tmp_path_factory.mktemp("comparison")
    return ["compare", str(write_comparison(folder)), "--out", str(folder / "out"), "--workers", "1"]


def test_the_table_and_the_report_and_nothing_run_twice(words: list[str], capsys: pytest.CaptureFixture) -> None:
    out = Path(words[3])
    assert main(words) == 0
    first = capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert all(results["arms"][arm]["title"] in first for arm in results["arms"])
    assert first.endswith(f"report: {out / 'report.html'}\n") and (out / "report.html").is_file()
    begun = time.process_time()
    assert main(words) == 0
    assert capsys.readouterr().out == first and time.process_time() - begun < 5


def test_a_run_that_failed_is_named_and_the_whole_did_not_succeed(
    words: list[str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(words) == 0
    results = json.loads((Path(words[3]) / "results.json").read_text())
    failed = {key: results["runs"][1][key] for key in ("arm", "size", "budget", "seed")}
    results["runs"][1] = {**failed, "run_dir": "runs/a", "status": "failed", "error": "boom"}
    monkeypatch.setattr(moestro.compare.run, "compare", lambda *arguments, **keywords: results)
    capsys.readouterr()
    assert main(words) == 1
    assert capsys.readouterr().err == "moestro: error: runs/a: boom\n"


def test_a_mistake_in_a_comparison_is_one_line(words: list[str], capsys: pytest.CaptureFixture) -> None:
    assert main([*words, "refrence=moe"]) == 2
    message = "moestro: error: unknown key 'refrence'; did you mean 'reference'? allowed: arms, budgets, common, "
    assert capsys.readouterr().err.startswith(message)

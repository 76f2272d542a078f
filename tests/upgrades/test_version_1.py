"""A run folder of the first version is evaluated, continued and exported by this one.

`version_1` was written by commit 31edbf0, the first with a whole command line: `moestro train recipe.yaml` beside
text.txt, one thread; of its two checkpoints the first was kept. metrics.jsonl is that of the whole run.
"""

import json
import shutil
from pathlib import Path

import pytest

from moestro.cli import main
from moestro.recipe.build import run_training
from moestro.recipe.evaluation import evaluate_run, opened_run
from moestro.recipe.load import load_recipe
from moestro.train.checkpoint import list_checkpoints, read_state
from moestro.upgrades import CHECKPOINT

FORMER = Path(__file__).parent / "version_1"


def steps(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    shutil.copytree(FORMER, tmp_path / "run")
    # its recipe names the text by a path from where it was started
    shutil.copy(FORMER / "text.txt", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def test_it_is_of_the_first_version():
    state = json.loads((FORMER / "checkpoints" / "step-00000004" / "state.json").read_text())
    assert state["format_version"] == 1 and "table_precision" not in state["settings"]
    assert "format_version" not in (FORMER / "recipe.yaml").read_text()


def test_its_state_reads_as_of_today(run):
    assert read_state(list_checkpoints(run / "checkpoints")[-1])["format_version"] == CHECKPOINT.version


def test_evaluated_it_is_what_it_was(run):
    then = json.loads((run / "metrics.jsonl").read_text().splitlines()[4])["eval"]
    figures = evaluate_run(opened_run(run), max_tokens=then["tokens"])
    assert figures["loss"] == pytest.approx(then["loss"], rel=1e-5)


def test_continued_it_goes_on_as_it_would_have(run):
    whole = steps(FORMER)
    result = run_training(load_recipe(run / "recipe.yaml"), run, show_preparation=False)
    continued = steps(run)
    assert result["step"] == 8 and continued[:4] == whole[:4]
    for then, now in zip(whole, continued, strict=True):
        for name in ("loss", "grad_norm", "lr", "flops"):
            assert now[name] == pytest.approx(then[name], rel=1e-4), (name, now["step"])
    newest = list_checkpoints(run / "checkpoints")[-1]
    assert json.loads((newest / "state.json").read_text())["format_version"] == CHECKPOINT.version


@pytest.mark.slow
def test_exported_and_offloaded_it_says_the_same(run, capsys):
    assert main(["export", str(run), "--out", "out", "--unfinished"]) == 0
    capsys.readouterr()
    texts = []
    for model in ("run", "out"):
        assert main(["generate", model, "--prompt", "the river", "--max-new-tokens", "8"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and len(texts[0]) > 4
    assert main(["offload", "run", "--memory", "1MiB", "--exact", "--prompt", "the river", "--tokens", "8"]) == 0

"""`moestro plan` on the command line."""

import json
from pathlib import Path

import pytest

from moestro.cli import main

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def test_a_plan_for_many_gpus_says_what_is_fastest_and_what_to_paste(capsys: pytest.CaptureFixture):
    assert main(["plan", str(RECIPES / "paper" / "hmoe-0.4b.yaml"), "--gpus", "8", "--gpu", "h200"]) == 0
    said = capsys.readouterr().out
    assert "the fastest that fit" in said and "parallel:" in said
    # as it is written, its 10 sequences a micro-batch are no 8 equal shares
    assert "batch_size=640 in accumulate=64 micro-batches cannot be shared equally" in " ".join(said.split())


def test_a_plan_for_this_machine_says_whether_the_recipe_fits(capsys: pytest.CaptureFixture, tmp_path: Path):
    small = tmp_path / "small.yaml"
    small.write_text("like: a100\nmemory: 3.0e9\n")
    assert main(["plan", str(RECIPES / "hmoe.yaml")]) == 0
    assert "one process" in capsys.readouterr().out
    assert main(["plan", str(RECIPES / "peer_million.yaml"), "--gpu", str(small)]) == 1
    said = capsys.readouterr().out
    assert "does not fit" in said and "tables" in said


def test_json_has_the_whole_plan(capsys: pytest.CaptureFixture):
    assert main(["plan", str(RECIPES / "hmoe.yaml"), "--gpus", "4", "--gpu", "h100", "--json", "--skew", "0.5"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["ranks"] == 4 and plan["fitting"][0]["seconds"]["step"] > 0


@pytest.mark.parametrize("words", [["--gpu", "h201"], ["--skew", "-1"], ["--efficiency", "2"], ["--gpus", "0"]])
def test_mistakes_are_explained(words: list[str], capsys: pytest.CaptureFixture):
    assert main(["plan", str(RECIPES / "hmoe.yaml"), *words]) == 2
    assert words[1] in capsys.readouterr().err


def test_a_sequence_of_no_length_is_refused_with_its_place(capsys: pytest.CaptureFixture):
    assert main(["plan", str(RECIPES / "peer.yaml"), "data.seq_len=0"]) == 2
    assert "seq_len=0; allowed: at least 1 (command line: data.seq_len)" in " ".join(capsys.readouterr().err.split())

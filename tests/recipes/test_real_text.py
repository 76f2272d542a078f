"""Every tiny recipe through the command line on WikiText-2: it learns, and its folder can be evaluated."""

import json
from pathlib import Path

import pytest

from moestro.cli import main
from tests.recipes.test_recipes import FOLDER, SHRUNK, TINY

STEPS = 30


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_learns_from_wikitext(name: str, shared_data: Path, tmp_path: Path) -> None:
    text = shared_data / "lm" / "wikitext-2" / "valid.txt"
    settings = [
        f"data.source={{kind: text, split: heading, paths: {text}}}",
        f"train.budget={{steps: {STEPS}}}",
        "train.eval_every=0",
        "train.eval_tokens=4096",
        *SHRUNK.get(name, []),
    ]
    run = tmp_path / "run"
    assert main(["train", str(FOLDER / name), "--out", str(run), *settings]) == 0
    losses = [
        found["loss"]
        for line in (run / "metrics.jsonl").read_text().splitlines()
        if "loss" in (found := json.loads(line))
    ]
    assert len(losses) == STEPS and sum(losses[-5:]) / 5 < losses[0] - 1
    assert main(["eval", str(run), "--tokens", "4096", "--json", str(tmp_path / "eval.json")]) == 0
    assert 0 < json.loads((tmp_path / "eval.json").read_text())["bpb"] < 4

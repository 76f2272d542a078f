"""docs/tour.md, followed block by block in an empty folder."""

import json
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from moestro.recipe.load import load_recipe
from tests.blocks import Block, Reader, blocks_of
from tests.conftest import ROOT

TOUR = ROOT / "docs" / "tour.md"
BLOCKS = blocks_of(TOUR)
# What blocks that are run print, at least: what begins a block, and words that must come.
PRINTED = {
    "from pathlib": ["files"],
    "moestro train mine.yaml model": ["top_k=9", "unknown key 'learning_rate'"],
    "moestro train mine.yaml --out": ["step 300", "bits per byte"],
    "moestro eval runs/mine\n": ["zlib -9", "blocks.1.ffn", "page: runs/mine/inspect.html"],
    "moestro eval runs/mine --set": [],
    "import torch": ["8 experts, widths", "1024 experts, widths"],
    "moestro generate": ["\n"],
    "moestro compress": ["wrote /", "/runs/narrow\n", "perplexity", "bits per byte"],
    "moestro export": ["MoestroForCausalLM"],
    "from transformers": ["The statement"],
    "moestro serve": ['"text":', '"finish_reason":'],
}


def test_every_block_is_run_a_file_or_output():
    assert {block.language for block in BLOCKS} == {"sh", "python", "yaml", "text"}
    assert [block.title for block in BLOCKS if block.language == "yaml"] == ["mine.yaml"]
    for start in PRINTED:
        assert sum(block.text.startswith(start) for block in BLOCKS) == 1, start
    assert len(PRINTED) == sum(block.language in ("sh", "python") for block in BLOCKS)


def test_its_recipe_is_one(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text(next(block.text for block in BLOCKS if block.title))
    assert load_recipe(file).model.n_layers == 3


def on_a_free_port(block: Block) -> Block:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return replace(block, text=block.text.replace("8000", str(free.getsockname()[1])))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="the tour asks its server by curl")
def test_the_tour_is_followed(tmp_path: Path):
    pytest.importorskip("uvicorn")
    reader = Reader(tmp_path)
    printed = {}
    for block in BLOCKS:
        if block.language == "text":
            continue
        out = reader.follow(on_a_free_port(block))
        start = next((start for start in PRINTED if block.text.startswith(start)), "")
        assert all(words in out for words in PRINTED.get(start, [])), f"{block.text}\nprinted:\n{out}"
        printed[start] = out
    # it learned, it was measured, it is smaller
    lines = [json.loads(line) for line in (tmp_path / "runs/mine/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert sum(losses[-10:]) / 10 < 0.8 * losses[0]
    assert json.loads((tmp_path / "one.json").read_text())["bpb"] > 1
    report = json.loads((tmp_path / "runs/narrow/report.json").read_text())
    assert report["after"] != report["before"]
    assert (tmp_path / "runs/mine/inspect.html").stat().st_size > 10_000
    refusals = next(block.text for block in BLOCKS if block.text.startswith("moestro: error: top_k=9"))
    for refusal in refusals.splitlines():
        assert refusal.split(" ... ")[0] in printed["moestro train mine.yaml model"]

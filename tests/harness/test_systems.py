"""Every kind of system scores under lm-eval what it scores in our own evaluation, and continues text."""

from pathlib import Path
from typing import Any

import pytest
import torch

from moestro.cli import main
from moestro.data import Batch, ByteTokenizer
from moestro.evaluate import evaluate
from moestro.export import open_model
from moestro.generation import Options, TextModel
from moestro.harness import ScoredModel, evaluate_tasks
from moestro.recipe.evaluation import opened_run
from tests.conftest import ROOT

SEQ_LEN = 32
TEXT = ("the quick brown fox jumps over lazy dogs; " * 40).encode()[: SEQ_LEN * 12].decode()
# systems that predict a token from later ones have no bits per byte of a text read once
RECIPES = ["hmoe", "peer", "peer_glu", "memory_plus", "modse", "mohge", "moe_plus_plus", "dynmoe", "dynamic_routing"]
RECIPES += [
    "mumoe",
    "hypermoe",
    "mpoe",
    "smola",
    "xmoe",
    "moec",
    "stratified",
    "multi_head",
    "remoe",
    "deepseek_v3",
    "dense",
]
# a second expert is drawn by the bits of the logits, and the last of these differ between kernels and batch shapes: one
# token of a few hundred gets another expert in float32, none in float64, whatever computes it
DRAWN = ("stratified",)
CLOSE = {"float32": 1e-5, "float64": 1e-9}


def dtype_of(system: str) -> str:
    """The dtype in which two ways of computing a system choose the same experts."""
    return "float64" if system in DRAWN else "float32"


def trained(recipe: str, folder: Path, small_data: list[str]) -> Path:
    few = [f"data.seq_len={SEQ_LEN}", "train.batch_size=2", "train.budget.steps=1", "train.eval_tokens=64"]
    assert main(["train", str(ROOT / "recipes" / f"{recipe}.yaml"), *small_data, *few, "--out", str(folder)]) == 0
    return folder


def own_bits_per_byte(run: Path, dtype: str) -> float:
    ids = torch.tensor([ByteTokenizer.eos_id, *TEXT.encode()])
    tokens, targets = ids[:-1].view(-1, SEQ_LEN), ids[1:].view(-1, SEQ_LEN)
    batch = Batch(tokens, targets, torch.zeros_like(tokens), torch.ones_like(tokens))
    return evaluate(opened_run(run).model.to(getattr(torch, dtype)), [batch])["bpb"]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_systems_score_the_same_and_generate(recipe: str, tmp_path: Path, small_data: list[str]) -> None:
    run = trained(recipe, tmp_path / "run", small_data)
    text: Path = tmp_path / "lm" / "wikitext-2" / "valid.txt"
    text.parent.mkdir(parents=True)
    text.write_text(TEXT)
    opened: Any = open_model(run, dtype=getattr(torch, dtype_of(recipe)))
    found = evaluate_tasks(ScoredModel(*opened, batch_size=5), ["wikitext"], tmp_path)
    metrics = found["tasks"]["wikitext"]["metrics"]
    own = own_bits_per_byte(run, dtype_of(recipe))
    assert metrics["bits_per_byte"]["value"] == pytest.approx(own, rel=CLOSE[dtype_of(recipe)])
    text_model = TextModel(*opened)
    continuation = text_model.begin(text_model.encode("fox"), Options(8))
    assert list(continuation.pieces())[-1].reason == continuation.reason in ("stop", "length")
    ids = [*text_model.encode("fox"), *continuation.new_tokens]
    with torch.no_grad():
        likeliest = opened.model(torch.tensor([ids])).logits[0].argmax(-1).tolist()
    assert likeliest[2 : 2 + len(continuation.new_tokens)] == continuation.new_tokens

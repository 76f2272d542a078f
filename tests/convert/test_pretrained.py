"""Public dense checkpoints through the command line: converted, trained on, measured, turned back."""

import json
from pathlib import Path

import pytest
import torch

from moestro.cli import main
from moestro.convert.run import dense_sites
from moestro.hf import Hosted, load
from moestro.layers import MoELayer, TaughtLayer
from moestro.recipe.evaluation import evaluate_run, opened_run
from tests.convert.test_stock import SIZES, folder
from tests.hf.test_pretrained_recipe import write_tokenizer

GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 4}
FAMILIES = {"llama": SIZES, "gpt2": GPT2}


@pytest.fixture(params=["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def public(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A public dense model with its tokenizer."""
    path = folder(request.param, tmp_path / "public", **{**FAMILIES[request.param], "vocab_size": 260})
    write_tokenizer(path)
    return path


def run_of(text: Path) -> list[str]:
    source = f"run.data.source={{kind: text, paths: {text}, split: blank-line}}"
    training = ["run.train.budget={steps: 2}", "run.train.batch_size=2", "run.train.eval_tokens=128"]
    return [source, "run.data.seq_len=32", *training, "run.train.tensorboard=false", "tokens=128", "router.steps=10"]


SPLIT = "method={kind: split, widths: {kind: equal, n_experts: 4}, top_k: 2, scale: fit}"


def test_a_public_model_is_split_trained_on_and_restored(public, text_file, tmp_path, capsys):
    out, back = tmp_path / "moe", tmp_path / "back"
    taught = ["taught=true", "run.objectives=[{kind: router_target, weight: 0.05}]"]
    assert main(["convert", str(public), "--out", str(out), SPLIT, *taught, *run_of(text_file)]) == 0
    report = json.loads((out / "convert.json").read_text())
    assert report["loss"]["all_experts"] == pytest.approx(report["loss"]["dense"], rel=1e-5)
    model = opened_run(out).model
    assert isinstance(model, Hosted) and all(isinstance(block.ffn, TaughtLayer) for block in model.blocks)

    assert main(["convert", str(out), "--back", "--out", str(back)]) == 0
    again = opened_run(back).model
    with again.stock() as stock:
        want = load(public, dtype=torch.float32).state_dict()
        assert all(torch.equal(tensor, want[name]) for name, tensor in stock.state_dict().items())

    assert main(["train", str(out / "recipe.yaml"), "--out", str(out)]) == 0
    assert evaluate_run(opened_run(out), max_tokens=128)["step"] == 2
    assert main(["convert", str(out), "--drop-teacher", "--out", str(tmp_path / "alone")]) == 0
    assert all(isinstance(block.ffn, MoELayer) for block in opened_run(tmp_path / "alone").model.blocks)
    # what was converted is not dense any more
    with pytest.raises(ValueError, match="no block of the model has a dense feed-forward layer"):
        dense_sites(opened_run(tmp_path / "alone").model, None)
    capsys.readouterr()


def test_a_public_model_without_text_is_asked_for_it(public, tmp_path, capsys):
    assert main(["convert", str(public), "--out", str(tmp_path / "moe"), SPLIT]) == 1
    assert "brings no text; say which: run.data.source={kind: text, paths: FILE}" in capsys.readouterr().err

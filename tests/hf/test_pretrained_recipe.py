"""`model: {kind: pretrained}`: a public checkpoint trains on with our objectives, resumes exactly, is measured."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from moestro.data import load_tokenizer
from moestro.export.opening import open_model
from moestro.hf import Hosted
from moestro.recipe.build import build_model, run_training
from moestro.recipe.evaluation import evaluate_run, opened_run
from moestro.recipe.inspection import inspect_run
from moestro.recipe.load import load_recipe
from moestro.recipe.syntax import RecipeError, dump_yaml
from moestro.train.checkpoint import read_tensors
from moestro.train.weights import load_weights, newest_checkpoint
from tests.hf.families import tiny
from tests.tolerances import FLOAT32


def write_tokenizer(folder: Path) -> None:
    """Byte-level, 257 tokens, of which the last ends a document."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens(["<end>"])
    model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A Mixtral in Hugging Face's format, with a tokenizer."""
    path = tmp_path / "mixtral"
    tiny("mixtral", vocab_size=260).save_pretrained(path)
    write_tokenizer(path)
    return path


def recipe_file(at: Path, data: Path, **model) -> Path:
    tree = {
        "model": {"kind": "pretrained", "folder": at.name, **model},
        "data": {
            "source": {"kind": "text", "paths": str(data), "split": "blank-line"},
            "tokenizer": {"kind": "pretrained", "folder": str(at)},
            "seq_len": 32,
        },
        "train": {"batch_size": 2, "budget": {"steps": 4}, "eval_tokens": 256, "save_every": 2, "tensorboard": False},
        "optim": {"lr": 1e-3},
        "objectives": [{"kind": "load_balance", "weight": 0.01}],
    }
    file = at.parent / "recipe.yaml"
    file.write_text(dump_yaml(tree))
    return file


def test_the_weights_are_the_folder_s_and_a_written_recipe_is_the_same(folder, text_file, tmp_path):
    recipe = load_recipe(recipe_file(folder, text_file))
    model = build_model(recipe, 257)
    assert isinstance(model, Hosted) and recipe.model.folder == folder
    with model.stock() as stock:
        want = tiny("mixtral", vocab_size=260).state_dict()
        assert all(torch.equal(tensor, want[name]) for name, tensor in stock.state_dict().items())
    recipe.write(tmp_path / "elsewhere.yaml")
    again = load_recipe(tmp_path / "elsewhere.yaml")
    assert again == recipe and again.tree["model"]["kind"] == "pretrained"
    assert next(build_model(recipe, 257, "meta").parameters()).device.type == "meta"


def test_it_trains_resumes_to_the_bit_and_is_measured(folder, text_file, tmp_path):
    file = recipe_file(folder, text_file)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    whole = run_training(load_recipe(file), tmp_path / "whole", show_preparation=False)
    assert whole["step"] == 4 and whole["eval"]["loss"] > 0

    # as if killed after two steps: what was learned later is gone
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    for end in ("done.json", "hashes.json"):
        (tmp_path / "killed" / end).unlink()
    shutil.rmtree(newest_checkpoint(tmp_path / "killed"))
    assert newest_checkpoint(tmp_path / "killed").name == "step-00000002"
    run_training(load_recipe(file), tmp_path / "killed", show_preparation=False)
    one, other = (read_tensors(newest_checkpoint(tmp_path / name), "model") for name in ("whole", "killed"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert {name.split(".")[0] for name in one} == {"decoder", "blocks"}
    line = json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["flops"] > 0

    figures = evaluate_run(opened_run(tmp_path / "whole"), max_tokens=256)
    assert figures["step"] == 4 and set(figures["layers"]) == {"blocks.0.ffn", "blocks.1.ffn"}
    found = inspect_run(opened_run(tmp_path / "whole"), max_tokens=256)
    assert set(found["curves"]) == {"top_k"} and found["layers"]["blocks.0.ffn"]["n_experts"] == 4
    assert load_tokenizer(tmp_path / "whole" / "tokenizer").vocab_size == 257
    opened, own = open_model(tmp_path / "whole"), build_model(load_recipe(tmp_path / "whole" / "recipe.yaml"), 257)
    load_weights(own, newest_checkpoint(tmp_path / "whole"))
    assert type(opened.model).__name__ == "MixtralForCausalLM"
    tokens = torch.tensor([opened.tokenizer("to be").input_ids])
    torch.testing.assert_close(opened.model(tokens).logits, own.eval()(tokens).logits, **FLOAT32)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_our_layers_take_the_place_of_blocks(folder, text_file):
    ours = {
        "kind": "moe",
        "router": {"kind": "scored", "score": {"kind": "linear"}, "select": {"kind": "top_k", "top_k": 1}},
    }
    ours["branches"] = [{"kind": "ffn", "widths": [8, 24]}]
    one = build_model(load_recipe(recipe_file(folder, text_file, layers={1: ours})), 257)
    assert [layer.router.n_experts for layer in one.moe_layers().values()] == [4, 2]
    every = load_recipe(recipe_file(folder, text_file, ffn=ours, layers={0: {"kind": "dense", "width": 16}}))
    model = build_model(every, 257)
    assert list(model.moe_layers()) == ["blocks.1.ffn"] and model.blocks[0].ffn.expert.width == 16
    # the same seed draws the same layers
    again = build_model(every, 257)
    assert torch.equal(model.blocks[1].ffn.bank.w_in.weight, again.blocks[1].ffn.bank.w_in.weight)


def test_what_cannot_be_is_said_with_its_place(folder, text_file):
    def error(**model) -> str:
        with pytest.raises(RecipeError) as caught:
            build_model(load_recipe(recipe_file(folder, text_file, **model)), 257)
        return str(caught.value)

    assert "nowhere is not a folder" in error(folder="nowhere") and "model.folder" in error(folder="nowhere")
    assert "unknown key 'foldr'" in error(foldr="x")
    assert "dtype" in error(dtype="int8") and "allowed: bfloat16, float16, float32" in error(dtype="int8")
    assert "layer 'first', allowed: the number of a block" in error(layers={"first": {"kind": "dense", "width": 8}})
    assert "layer 7, allowed: 0 to 1" in error(layers={7: {"kind": "dense", "width": 8}})
    assert "kind='hosted', allowed: pretrained" in error(kind="hosted")
    with pytest.raises(RecipeError, match="the tokenizer has 300 tokens, the model in .* 260"):
        build_model(load_recipe(recipe_file(folder, text_file)), 300)

"""Dense public checkpoints upcycled into stock mixtures: loaded by transformers, equal logits, equal bytes."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moestro.cli import main
from moestro.convert import stock
from moestro.convert.layers import ConversionError
from moestro.convert.stock import TARGETS, upcycle_folder
from moestro.convert.upcycle import Upcycle
from moestro.formats import Checkpoint
from moestro.ops.whole_files import require_intact

SIZES = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
}


def folder(kind: str, path: Path, **more: object) -> Path:
    """A random dense model of a family, saved by transformers."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **more}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.save_pretrained(path)
    (path / "tokenizer_config.json").write_text("{}")
    return path


def logits(path: Path) -> torch.Tensor:
    loaded = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, dtype=torch.float32)
    model, found = loaded
    assert not any(found[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        return model(torch.arange(24).view(2, 12)).logits


@pytest.mark.parametrize("kind", TARGETS)
def test_the_stock_mixture_computes_what_the_dense_model_did(kind, tmp_path):
    dense = folder(kind, tmp_path / "dense")
    found = upcycle_folder(dense, tmp_path / "moe", Upcycle(4, 2))
    assert found == {"family": TARGETS[kind].model_type, "layers": 2, "n_experts": 4}
    torch.testing.assert_close(logits(tmp_path / "moe"), logits(dense), rtol=1e-4, atol=1e-4)
    made = Checkpoint(tmp_path / "moe")
    assert made.family.model_type == TARGETS[kind].model_type and made.n_experts(0) == 4
    router = made.router(0)["weight"]
    assert router.shape == (4, 16) and not torch.equal(router, made.router(1)["weight"])
    assert (tmp_path / "moe" / "tokenizer_config.json").exists()
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert config["architectures"] == [TARGETS[kind].architecture] and config["num_experts_per_tok"] == 2


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_what_the_dense_config_leaves_to_defaults_is_said(kind, tmp_path):
    """As in the first Llama's: Mixtral's defaults are others."""
    dense = folder(kind, tmp_path / "dense")
    file = dense / "config.json"
    said = json.loads(file.read_text())
    file.write_text(json.dumps({key: said[key] for key in (*SIZES, "model_type", "architectures")}))
    upcycle_folder(dense, tmp_path / "moe", Upcycle(4, 2))
    torch.testing.assert_close(logits(tmp_path / "moe"), logits(dense), rtol=1e-5, atol=1e-5)
    made = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert made["rope_theta"] == 10_000 and made["rms_norm_eps"] == 1e-6


def test_large_models_are_written_in_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(stock, "SHARD", 20_000)
    dense = folder("mistral", tmp_path / "dense")
    upcycle_folder(dense, tmp_path / "moe", Upcycle(4, 2))
    assert len(list((tmp_path / "moe").glob("*.safetensors"))) > 2
    torch.testing.assert_close(logits(tmp_path / "moe"), logits(dense), rtol=1e-4, atol=1e-4)


def test_what_goes_with_any_weights_comes_along(tmp_path):
    dense = folder("llama", tmp_path / "dense")
    (dense / "original").mkdir()
    for name in ("tokenizer.json", "original/params.json", "original/consolidated.00.pth", "model.gguf", "hashes.json"):
        (dense / name).write_text("{}")
    upcycle_folder(dense, tmp_path / "moe", Upcycle(2, 1))
    came = {path.relative_to(tmp_path / "moe").as_posix() for path in (tmp_path / "moe").rglob("*") if path.is_file()}
    own = {"config.json", "generation_config.json", "tokenizer_config.json", "model.safetensors", "hashes.json"}
    assert came == {"tokenizer.json", "original/params.json"} | own
    require_intact(tmp_path / "moe")


def test_a_copy_that_is_none_is_found_out(tmp_path, monkeypatch):
    dense = folder("llama", tmp_path / "dense")
    upcycle_folder(dense, tmp_path / "moe", Upcycle(2, 1))
    other = folder("llama", tmp_path / "other", initializer_range=0.5)
    changed = Checkpoint(other)
    family = stock.DENSE_FAMILIES["llama"]
    monkeypatch.setattr(changed, "read", lambda name: Checkpoint(dense).read(name) + 1)
    with pytest.raises(ConversionError, match="expert 0 of layer 0 is not the dense network"):
        stock.verified(tmp_path / "moe", changed, family)


def test_what_a_stock_folder_cannot_say_is_refused(tmp_path):
    biased = folder("llama", tmp_path / "biased", attention_bias=True)
    with pytest.raises(ConversionError, match="attention_bias=True, which mixtral does not have"):
        upcycle_folder(biased, tmp_path / "moe", Upcycle(4, 2))
    dense = folder("llama", tmp_path / "dense")
    for method in (Upcycle(4, 2, drop=0.5), Upcycle(4, 2, granularity=2), Upcycle(4, 2, gate="softmax")):
        with pytest.raises(ConversionError, match="a stock folder takes plain copies"):
            upcycle_folder(dense, tmp_path / "moe", method)
    gpt2 = tmp_path / "gpt2"
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_layer=1, n_embd=8, n_head=2)).save_pretrained(gpt2)
    with pytest.raises(ConversionError, match="model_type 'gpt2' has no stock mixture; allowed: llama, mistral, qwen2"):
        upcycle_folder(gpt2, tmp_path / "moe", Upcycle(4, 2))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("")
    with pytest.raises(ConversionError, match="there is not empty: choose another folder"):
        upcycle_folder(dense, tmp_path / "there", Upcycle(4, 2))
    for out in (dense, dense / "inside"):
        with pytest.raises(ConversionError, match="lies in .*dense, which is only read"):
            upcycle_folder(dense, out, Upcycle(4, 2))


def test_from_the_command_line(tmp_path, capsys):
    dense = folder("qwen3", tmp_path / "dense")
    words = ["method={kind: upcycle, n_experts: 3, top_k: 2}", "--stock", "--out", str(tmp_path / "moe")]
    assert main(["convert", str(dense), *words]) == 0
    assert "2 layers of 3 experts, each equal to the dense network; qwen3_moe" in capsys.readouterr().out
    assert main(["convert", str(dense), *words, "router.start=zero"]) == 1
    assert "is not empty" in capsys.readouterr().err

"""Folders are checked, then loaded to the bit."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, dynamic_module_utils

from moestro.formats import FormatError
from moestro.hf import load
from tests.hf.families import DENSE, MOE, some_tokens, tiny


@pytest.mark.parametrize("family", [*MOE, *DENSE])
def test_logits_and_tensors_are_those_of_transformers_to_the_bit(family, tmp_path):
    tiny(family).save_pretrained(tmp_path)
    ours, theirs = load(tmp_path, experts="eager"), AutoModelForCausalLM.from_pretrained(tmp_path)
    theirs.set_experts_implementation("eager")
    state = theirs.state_dict()
    assert ours.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items())
    with torch.no_grad():
        assert torch.equal(ours(some_tokens()).logits, theirs(some_tokens()).logits)
    assert not ours.training


def test_dtype_and_implementation_are_those_that_are_asked_for(tmp_path):
    tiny("olmoe", dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert load(tmp_path).dtype == torch.bfloat16
    model = load(tmp_path, experts="moestro", attention="eager", dtype=torch.float32)
    assert (model.dtype, model.config._experts_implementation) == (torch.float32, "moestro")
    assert model.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="experts='quick', allowed: eager, .*moestro"):
        load(tmp_path, experts="quick")


def test_sharded_folders_load(tmp_path):
    tiny("mixtral").save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    have = load(tmp_path, "eager", attention="eager")(some_tokens()).logits
    assert torch.equal(have, tiny("mixtral")(some_tokens()).logits)


def test_what_is_wrong_with_a_folder_is_said(tmp_path):
    with pytest.raises(FormatError, match="nowhere is not a folder"):
        load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match=r"has no config\.json"):
        load(tmp_path / "empty")
    folder = tmp_path / "model"
    tiny("mixtral").save_pretrained(folder)
    file, config = folder / "model.safetensors", folder / "config.json"
    whole, said = load_file(file), json.loads(config.read_text())
    lost = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    save_file({name: tensor for name, tensor in whole.items() if name != lost}, file, {"format": "pt"})
    with pytest.raises(FormatError, match=lost):
        load(folder)
    save_file({name: t for name, t in whole.items() if "norm" not in name}, file, {"format": "pt"})
    with pytest.raises(FormatError, match="missing keys for MixtralForCausalLM: .*norm"):
        load(folder)
    save_file({**whole, "model.layers.0.extra.weight": torch.zeros(2)}, file, {"format": "pt"})
    with pytest.raises(FormatError, match=r"unexpected keys .*layers\.0\.extra"):
        load(folder)
    save_file(whole, file, {"format": "pt"})
    config.write_text(json.dumps({**said, "model_type": "bert"}))
    with pytest.raises(FormatError, match="model_type 'bert', allowed: mixtral, .*gpt2"):
        load(folder)


def test_code_in_a_folder_runs_only_when_asked(tmp_path, monkeypatch):
    tiny("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": auto}))
    (tmp_path / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    with pytest.raises(FormatError, match=r"model_type 'own'.*asks for code of its own \(auto_map\)"):
        load(tmp_path)
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    model = load(tmp_path, attention="eager", trust_remote_code=True)
    assert torch.equal(model(some_tokens()).logits, tiny("llama")(some_tokens()).logits)

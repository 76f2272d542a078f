"""Compressed folders of every family: plain transformers loads them, and they compute what masking computes."""

import json

import pytest
import torch
from safetensors.torch import load_file

from moestro.compress.applying import RECORD, apply_plan
from moestro.compress.feasible import InfeasibleError, Output
from moestro.formats import FAMILIES as KNOWN
from moestro.formats import Checkpoint
from tests.compress.folders import FAMILIES, FEWER, GROUPED, blocks, loaded, masked, plan_for, saved, some_of
from tests.hf.families import some_tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_folders_load_in_plain_transformers_and_equal_masking(tmp_path, family):
    model = saved(family, tmp_path / "src", shards=True)
    keep = some_of(family)
    apply_plan(tmp_path / "src", plan_for(tmp_path / "src", keep), tmp_path / "dst")
    small = loaded(tmp_path / "dst")
    with torch.no_grad(), masked(model, dict.fromkeys(range(9), keep)):
        want = model(some_tokens()).logits
    with torch.no_grad():
        have = small(some_tokens()).logits
    torch.testing.assert_close(have, want, rtol=0, atol=3e-6)
    config = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("src", "dst")]
    changed = {key for key in config[0].keys() | config[1].keys() if config[0].get(key) != config[1].get(key)}
    assert changed == set(KNOWN[family].count_keys)
    assert {config[1][key] for key in changed} == {len(keep)}


@pytest.mark.parametrize("family", FEWER)
def test_saving_the_loaded_model_again_gives_the_same_tensors(tmp_path, family):
    saved(family, tmp_path / "src")
    apply_plan(tmp_path / "src", plan_for(tmp_path / "src", some_of(family)), tmp_path / "dst")
    loaded(tmp_path / "dst").save_pretrained(tmp_path / "again")
    first, again = (load_file(tmp_path / name / "model.safetensors") for name in ("dst", "again"))
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("family", FEWER)
def test_a_plan_that_changes_nothing_copies_bytes(tmp_path, family):
    saved(family, tmp_path / "src", shards=True)
    everyone = range(16 if family in GROUPED else 8)
    apply_plan(tmp_path / "src", plan_for(tmp_path / "src", everyone), tmp_path / "dst")
    files = {path.name for path in (tmp_path / "src").iterdir()}
    for name in files:
        assert (tmp_path / "dst" / name).read_bytes() == (tmp_path / "src" / name).read_bytes()
    assert {path.name for path in (tmp_path / "dst").iterdir()} == files | {
        RECORD,
        "compression_plan.json",
        "hashes.json",
    }


@pytest.mark.parametrize("family", FEWER)
def test_the_index_says_exactly_what_is_there(tmp_path, family):
    saved(family, tmp_path / "src", shards=True)
    apply_plan(tmp_path / "src", plan_for(tmp_path / "src", some_of(family)), tmp_path / "dst")
    index = json.loads((tmp_path / "dst" / "model.safetensors.index.json").read_text())
    files = {path.name: load_file(path) for path in (tmp_path / "dst").glob("*.safetensors")}
    placed = {name: file for file, tensors in files.items() for name in tensors}
    tensors = [tensor for file in files.values() for tensor in file.values()]
    assert index["weight_map"] == placed
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors)
    assert index["metadata"]["total_parameters"] == sum(tensor.numel() for tensor in tensors)
    assert Checkpoint(tmp_path / "dst").n_experts(Checkpoint(tmp_path / "dst").moe_layers[0]) == len(some_of(family))


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen2_moe"])
def test_what_is_no_routed_expert_stays_as_it_is(tmp_path, family):
    """Shared experts, dense layers, attention: the same names and bits."""
    saved(family, tmp_path / "src")
    apply_plan(tmp_path / "src", plan_for(tmp_path / "src", some_of(family)), tmp_path / "dst")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("src", "dst"))
    own = [name for name in before if ".experts." not in name and ".mlp.gate." not in name]
    assert any("shared_expert" in name for name in own) and any("self_attn" in name for name in own)
    assert all(torch.equal(before[name], after[name]) for name in own)


@pytest.mark.parametrize("family", FEWER)
def test_narrower_experts_are_experts_whose_other_units_add_nothing(tmp_path, family):
    """Where one key of config.json sizes experts and what else there is, only a custom folder can say so."""
    model = saved(family, tmp_path / "src")
    checkpoint = Checkpoint(tmp_path / "src")
    width, count = checkpoint.width(checkpoint.moe_layers[0]), checkpoint.n_experts(checkpoint.moe_layers[0])
    half = tuple(range(0, width, 2))
    plan, custom = plan_for(tmp_path / "src", range(count), units=(half,) * count), KNOWN[family].width_of_all
    if custom:
        with pytest.raises(InfeasibleError, match="a stock folder cannot say experts narrower than shared ones"):
            apply_plan(tmp_path / "src", plan, tmp_path / "dst")
    folder = apply_plan(tmp_path / "src", plan, tmp_path / "dst", Output("custom" if custom else "stock"))
    small = loaded(folder, trust=custom)
    with torch.no_grad():
        for block in blocks(model).values():
            down = block.experts.down_proj
            units = down if block.experts.is_transposed else down.mT
            units[:, 1::2] = 0
        torch.testing.assert_close(small(some_tokens()).logits, model(some_tokens()).logits, rtol=0, atol=3e-6)

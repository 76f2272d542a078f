"""Folders padded with dead experts: stock code, different survivors in every layer, exact."""

import json

import pytest
import torch
from safetensors.torch import load_file

from moestro.compress import PlanError
from moestro.compress.applying import apply_plan
from moestro.compress.feasible import Output
from tests.compress.folders import GROUPED, blocks, loaded, masked, plan_for, saved
from tests.hf.families import some_tokens

PADDED = Output("padded")


def padded(tmp_path, keep):
    apply_plan(tmp_path / "src", plan_for(tmp_path / "src", keep), tmp_path / "dst", PADDED)
    return loaded(tmp_path / "dst")


def logits(model):
    with torch.no_grad():
        return model(some_tokens(4)).logits


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe", "gpt_oss"])
def test_different_numbers_in_every_layer_are_exact(tmp_path, family):
    model = saved(family, tmp_path / "src")
    # layers and routing groups lose different numbers of experts
    keep = {1: (0, 1, 3, 4, 5, 6, 8, 11, 13, 14, 15), 2: (0, 1, 4, 7, 9, 10, 12, 13, 14)}
    if family not in GROUPED:
        keep = {0: (0, 1, 2, 4, 6, 7), 1: (2, 3, 5)}
    small = padded(tmp_path, keep)
    with masked(model, keep):
        torch.testing.assert_close(logits(small), logits(model), rtol=0, atol=3e-6)
    key = "num_local_experts" if family == "gpt_oss" else "n_routed_experts"
    slots = 6 if family == "gpt_oss" else 12
    assert json.loads((tmp_path / "dst" / "config.json").read_text())[key] == slots
    assert {block.experts.num_experts for block in blocks(small).values()} == {slots}


def test_dead_experts_are_nothing_but_zeros_and_a_bias(tmp_path):
    saved("deepseek_v3", tmp_path / "src")
    keep = {1: tuple(range(16)), 2: (0, 1, 4, 5, 8, 9, 12, 13)}
    padded(tmp_path, keep)
    tensors = load_file(tmp_path / "dst" / "model.safetensors")
    for slot in range(16):
        dead = slot % 4 >= 2
        stem = f"model.layers.2.mlp.experts.{slot}"
        assert all(bool(tensors[f"{stem}.{part}_proj.weight"].any()) != dead for part in ("gate", "up", "down"))
        assert bool(tensors["model.layers.2.mlp.gate.weight"][slot].any()) != dead
        assert (float(tensors["model.layers.2.mlp.gate.e_score_correction_bias"][slot]) == -1e4) == dead


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v2", "phimoe"])
def test_routers_without_a_selection_bias_are_not_padded(tmp_path, family):
    saved(family, tmp_path / "src")
    keep = {0: range(8), 1: range(7)} if family not in GROUPED else {1: range(16), 2: range(15)}
    with pytest.raises(PlanError, match="cannot say a dead expert that is never chosen.*no selection bias.*'custom'"):
        padded(tmp_path, keep)
    assert not (tmp_path / "dst").exists()

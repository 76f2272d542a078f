"""Folders with a modeling file: what no stock configuration can say, computed as surgery in memory computes it."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moestro.compress import Group, PlanError
from moestro.compress.applying import apply_plan
from moestro.compress.feasible import Output
from moestro.formats import Checkpoint
from tests.compress.folders import FEWER, GROUPED, LARGER, blocks, loaded, masked, plan_for, saved, some_of
from tests.hf.families import some_tokens, tiny

CUSTOM = Output("custom")


def compressed(tmp_path, plan, output=CUSTOM):
    apply_plan(tmp_path / "src", plan, tmp_path / "dst", output)
    return loaded(tmp_path / "dst", trust=True)


def logits(model):
    with torch.no_grad():
        return model(some_tokens()).logits


def uneven(folder):
    """Fewer experts in every further layer with experts."""
    checkpoint = Checkpoint(folder)
    n, layers = checkpoint.n_experts(checkpoint.moe_layers[0]), checkpoint.moe_layers
    if checkpoint.family.model_type in GROUPED:
        return dict(zip(layers, (range(n), some_of(checkpoint.family.model_type)), strict=True))
    return {layer: range(i, n) for i, layer in enumerate(layers)}


@pytest.mark.parametrize("family", FEWER)
def test_layers_with_numbers_of_experts_of_their_own_equal_masking(tmp_path, family):
    model = saved(family, tmp_path / "src")
    keep = uneven(tmp_path / "src")
    small = compressed(tmp_path, plan_for(tmp_path / "src", keep))
    with masked(model, keep):
        torch.testing.assert_close(logits(small), logits(model), rtol=0, atol=3e-6)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_a_custom_folder_is_a_transformers_model_like_others(tmp_path, family):
    saved(family, tmp_path / "src")
    small = compressed(tmp_path, plan_for(tmp_path / "src", uneven(tmp_path / "src")))
    want = logits(small)
    for implementation in ("grouped_mm", "batched_mm"):
        small.set_experts_implementation(implementation)
        assert {block.experts.config._experts_implementation for block in blocks(small).values()} == {implementation}
        torch.testing.assert_close(logits(small), want, rtol=0, atol=3e-6)
    small.set_experts_implementation("eager")
    assert small.generate(some_tokens(1, 4), max_new_tokens=3, do_sample=False).shape == (1, 7)
    small.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "modeling_compressed.py").is_file()
    first, again = (load_file(tmp_path / name / "model.safetensors") for name in ("dst", "again"))
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
    assert torch.equal(logits(loaded(tmp_path / "again", trust=True)), want)


def test_folders_of_two_families_load_in_one_process_in_any_order(tmp_path):
    for family in ("mixtral", "phimoe"):
        saved(family, tmp_path / family)
        plan = plan_for(tmp_path / family, uneven(tmp_path / family))
        apply_plan(tmp_path / family, plan, tmp_path / f"small_{family}", CUSTOM)
    want = {}
    for family in ("mixtral", "phimoe", "mixtral", "phimoe"):
        have = logits(loaded(tmp_path / f"small_{family}", trust=True))
        assert torch.equal(have, want.setdefault(family, have))


def test_router_logits_of_unequal_layers_are_refused(tmp_path):
    saved("mixtral", tmp_path / "src")
    small = compressed(tmp_path, plan_for(tmp_path / "src", uneven(tmp_path / "src")))
    with pytest.raises(ValueError, match="output_router_logits"):
        small(some_tokens(), output_router_logits=True)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "granitemoe"])
def test_stock_code_never_loads_a_custom_folder_as_something_else(tmp_path, family):
    saved(family, tmp_path / "src")
    checkpoint = Checkpoint(tmp_path / "src")
    plans = {
        "uneven": plan_for(tmp_path / "src", uneven(tmp_path / "src")),
        "zero": plan_for(tmp_path / "src", some_of(family), semantics="zero"),
    }
    if family != "granitemoe":
        plans["factors"] = plan_for(tmp_path / "src", some_of(family), ranks=(4,) * 6)
    for name, plan in plans.items():
        apply_plan(tmp_path / "src", plan, tmp_path / name, CUSTOM)
        with pytest.raises(RuntimeError, match="mismatch|size"):
            AutoModelForCausalLM.from_pretrained(tmp_path / name, trust_remote_code=False)
    assert checkpoint.config["architectures"]


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2", "granitemoe", "gpt_oss", "phimoe"])
def test_removed_experts_that_answer_zero_equal_experts_whose_output_is_zero(tmp_path, family):
    model = saved(family, tmp_path / "src")
    keep = some_of(family)
    small = compressed(tmp_path, plan_for(tmp_path / "src", keep, semantics="zero"))
    for block in blocks(model).values():
        gone = [expert for expert in range(block.experts.num_experts) if expert not in keep]
        with torch.no_grad():
            block.experts.down_proj[gone] = 0
            if hasattr(block.experts, "down_proj_bias"):
                block.experts.down_proj_bias[gone] = 0
    if family == "gpt_oss":
        # no expert answers here by one that answers with weight 0, whose products have more rows
        torch.testing.assert_close(logits(small), logits(model), rtol=0, atol=3e-6)
    else:
        assert torch.equal(logits(small), logits(model))


PAIRS = tuple(Group((2 * i, 2 * i + 1), (1.0, 0.0)) for i in range(4))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_that_share_one_are_that_one_with_both_routers(tmp_path, family):
    model = tiny(family, dtype=torch.float64, **LARGER[family])
    with torch.no_grad():
        for block in blocks(model).values():
            for tensor in block.experts.parameters():
                tensor[1::2] = tensor[0::2]
    model.save_pretrained(tmp_path / "src")
    plan = plan_for(tmp_path / "src", (0, 2, 4, 6), semantics="remap", groups=PAIRS)
    torch.testing.assert_close(logits(compressed(tmp_path, plan)), logits(model), rtol=0, atol=1e-13)
    merged = plan_for(tmp_path / "src", (0, 2, 4, 6), semantics="remap", groups=tuple(
        Group((2 * i, 2 * i + 1), (0.5, 0.5), align=family == "mixtral") for i in range(4)
    ))  # fmt: skip
    shutil.rmtree(tmp_path / "dst")
    torch.testing.assert_close(logits(compressed(tmp_path, merged)), logits(model), rtol=0, atol=1e-13)


def test_experts_of_different_widths_and_factors_compute_what_their_matrices_say(tmp_path):
    model = saved("mixtral", tmp_path / "src")
    units = (tuple(range(24)), tuple(range(0, 24, 2)), None, (1, 5), None, None)
    ranks = (None, None, 8, None, 24, None)
    plan = plan_for(tmp_path / "src", some_of("mixtral"), units=units, ranks=ranks)
    small = compressed(tmp_path, plan)
    dense = Output("stock", densify=True)
    with pytest.raises(PlanError, match="experts of different widths"):
        apply_plan(tmp_path / "src", plan, tmp_path / "dense", dense)
    keep = some_of("mixtral")
    with torch.no_grad():
        for block in blocks(model).values():
            for old, chosen, rank in zip(keep, units, ranks, strict=True):
                up, down = block.experts.gate_up_proj[old], block.experts.down_proj[old]
                lost = [unit for unit in range(24) if chosen is not None and unit not in chosen]
                down[:, lost] = 0
                if rank is not None:
                    for matrix in (up[:24], up[24:], down):
                        u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
                        matrix.copy_((u[:, :rank] * s[:rank] @ vt[:rank]).float())
    with masked(model, {0: keep, 1: keep}):
        torch.testing.assert_close(logits(small), logits(model), rtol=0, atol=1e-5)


def test_multiplied_out_factors_load_in_plain_transformers(tmp_path):
    saved("qwen3_moe", tmp_path / "src")
    plan = plan_for(tmp_path / "src", some_of("qwen3_moe"), ranks=(6,) * 6)
    with pytest.raises(PlanError, match="low-rank factors.*--densify.*custom"):
        apply_plan(tmp_path / "src", plan, tmp_path / "stock")
    apply_plan(tmp_path / "src", plan, tmp_path / "stock", Output("stock", densify=True))
    want = logits(compressed(tmp_path, plan))
    torch.testing.assert_close(logits(loaded(tmp_path / "stock")), want, rtol=0, atol=3e-6)


def test_experts_below_a_share_of_the_first_gate_are_skipped(tmp_path):
    model = saved("mixtral", tmp_path / "src")
    small = compressed(tmp_path, plan_for(tmp_path / "src", range(8), skip_below=0.5))
    skipped = 0

    def renormalised(module, arguments):
        nonlocal skipped
        hidden, index, weights = arguments
        keep = weights[:, 1] >= 0.5 * weights[:, 0]
        skipped += int((~keep).sum())
        first = torch.where(keep, weights[:, 0], 1.0)
        return hidden, index, torch.stack([first, torch.where(keep, weights[:, 1], 0.0)], 1)

    for block in blocks(model).values():
        block.experts.register_forward_pre_hook(renormalised)
    torch.testing.assert_close(logits(small), logits(model), rtol=0, atol=3e-6)
    assert skipped

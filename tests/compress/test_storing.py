"""Folders whose experts are in 8 or 4 bits: written from a plan, pruned in the same go, read by plain transformers."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moestro.compress.applying import apply_plan
from moestro.compress.feasible import Output
from moestro.compress.methods import Request
from moestro.compress.plan import PlanError, Quantisation
from moestro.compress.quantised import quantisation_config, quantised, quantised_share, restored
from moestro.compress.running import compressed
from moestro.data import ByteTokenizer
from moestro.formats import Checkpoint
from tests.compress.folders import loaded, plan_for, saved

pytest.importorskip("compressed_tensors")
pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than 100 tokens")
TOKENS = torch.arange(40)[None]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixtral")
    torch.manual_seed(0)
    saved("mixtral", folder, vocab_size=300, intermediate_size=32)
    ByteTokenizer().save(folder)
    return folder


@pytest.mark.parametrize("scheme", ["int8", "int4", "fp8"])
def test_a_pruned_folder_s_experts_are_those_numbers_in_fewer_bits(source, tmp_path, scheme):
    how = Quantisation(scheme, 16 if scheme == "int4" else 0)
    plan = plan_for(source, (0, 2, 3, 4, 6, 7))
    pruned = loaded(apply_plan(source, plan, tmp_path / "pruned"))
    folder = apply_plan(source, replace(plan, quantise=how), tmp_path / scheme)
    found = loaded(folder)
    with torch.no_grad():
        for mine, layer in zip(pruned.model.layers, found.model.layers, strict=True):
            for name in ("gate_up_proj", "down_proj"):
                whole, few = getattr(mine.mlp.experts, name), getattr(layer.mlp.experts, name)
                for expert in range(6):
                    parts = whole[expert].chunk(2) if name == "gate_up_proj" else [whole[expert]]
                    expected = torch.cat([restored(quantised(part.contiguous(), how), how) for part in parts])
                    torch.testing.assert_close(few[expert], expected)
            assert torch.equal(mine.mlp.gate.weight, layer.mlp.gate.weight)
        assert 0 < float((found(TOKENS).logits - pruned(TOKENS).logits).abs().max()) < 0.5
    share = quantised_share(folder)
    experts = sum(p.numel() for name, p in pruned.named_parameters() if ".experts." in name)
    assert share == pytest.approx(experts / sum(p.numel() for p in pruned.parameters()))
    assert quantised_share(source) == 0


def test_a_calibrated_plan_prunes_and_quantises_from_the_text(source, tmp_path, text_file):
    options = {"quantise": "int4", "group_size": 16, "calibrated": True}
    request = Request(source, "reap", 0.25, text=str(text_file), tokens=2048, seq_len=32, options=options)
    folder = compressed(request, tmp_path / "dst")
    plan = json.loads((folder / "compression_plan.json").read_text())
    assert plan["quantise"] == {"scheme": "int4", "group_size": 16, "calibrated": True} and plan["tensors"]
    plainly = compressed(replace(request, options={**options, "calibrated": False}), tmp_path / "plain")
    found, plain = loaded(folder), loaded(plainly)
    assert not torch.equal(found.model.layers[0].mlp.experts.down_proj, plain.model.layers[0].mlp.experts.down_proj)
    assert Checkpoint(folder).n_experts(0) == 6


def test_what_cannot_be_stored_is_refused(source, tmp_path):
    plan = plan_for(source, (0, 2, 3, 4, 6, 7), quantise=Quantisation("int4", 24))
    with pytest.raises(PlanError, match="group_size=24"):
        apply_plan(source, plan, tmp_path / "a")
    calibrated = replace(plan, quantise=Quantisation("int4", 16, calibrated=True))
    with pytest.raises(PlanError, match="have no moments.0.0.input"):
        apply_plan(source, calibrated, tmp_path / "b")
    ranks = replace(plan.layers[0], ranks=(4,) * 6)
    factored = replace(plan, quantise=Quantisation("int8"), layers=(ranks, *plan.layers[1:]))
    with pytest.raises(PlanError, match="factors, unequal widths"):
        apply_plan(source, factored, tmp_path / "c", Output("custom"))
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()
    fused = tmp_path / "granite"
    saved("granitemoe", fused)
    with pytest.raises(PlanError, match="one tensor on disk.* would load without its experts"):
        apply_plan(fused, plan_for(fused, (0, 2, 3, 4, 6, 7), quantise=Quantisation("int8")), tmp_path / "d")
    twice = apply_plan(source, replace(plan, quantise=Quantisation("int8")), tmp_path / "once")
    again = plan_for(twice, (0, 1, 2), quantise=Quantisation("int8"))
    with pytest.raises(PlanError, match="quantised already"):
        apply_plan(twice, again, tmp_path / "e")


@pytest.mark.parametrize("family", ["granitemoe", "gpt_oss"])
@pytest.mark.parametrize("stacked", [True, False])
def test_transformers_restores_no_experts_that_are_one_tensor_on_disk(tmp_path, family, stacked):
    """Why such families are refused: once this fails, they need not be."""
    how, source, folder = Quantisation("int8"), tmp_path / "src", tmp_path / "dst"
    saved(family, source, hidden_size=32, intermediate_size=32)
    stored, lost = {}, set()
    for name, tensor in load_file(source / "model.safetensors").items():
        if tensor.ndim != 3:
            stored[name] = tensor
            continue
        lost.add(name)
        each = [quantised(matrix.contiguous(), how) for matrix in tensor]
        stem = name.removesuffix(".weight")
        for part in each[0]:
            named = {f"{stem}.{e}.{part}": tensors[part] for e, tensors in enumerate(each)}
            stored |= {f"{stem}.{part}": torch.stack(list(named.values()))} if stacked else named
    folder.mkdir()
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": quantisation_config(how)}
    (folder / "config.json").write_text(json.dumps(config))
    _, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert len(report["missing_keys"]) == len(lost) == 4
    assert all(name.endswith(("gate_up_proj", "down_proj")) for name in report["missing_keys"])

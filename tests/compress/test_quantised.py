"""Experts in 8 and 4 bits: stored by compressed-tensors, rounded by GPTQ, read by transformers."""

import json
from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import load_file, save_file

from moestro.compress.plan import Quantisation
from moestro.compress.quantised import gptq, quantisation_config, quantised, restored
from tests.tolerances import FLOAT32_LAST_BITS

pytest.importorskip("compressed_tensors")
SCHEMES = [Quantisation("int8"), Quantisation("int8", 16), Quantisation("int4"), Quantisation("int4", 16)]


def matrix(o=24, i=64, seed=0):
    return torch.randn(o, i, generator=torch.Generator().manual_seed(seed))


def inputs(n=400, i=64):
    """Inputs of very unequal directions."""
    turn = torch.linalg.qr(matrix(i, i, 3)).Q
    return matrix(n, i, 2) @ torch.diag(torch.logspace(-1, 1, i)) @ turn


@pytest.mark.parametrize("how", SCHEMES, ids=str)
def test_every_number_is_one_of_the_levels_and_the_nearest(how):
    w = matrix()
    found = restored(quantised(w, how), how)
    size, levels = how.group_size or 64, 2 ** (4 if how.scheme == "int4" else 8)
    for group, near in zip(w.split(size, 1), found.split(size, 1), strict=True):
        scale = group.abs().amax(1, keepdim=True) / ((levels - 1) / 2)
        expected = (group / scale).round().clamp(-levels // 2, levels // 2 - 1) * scale
        torch.testing.assert_close(near, expected, **FLOAT32_LAST_BITS)


def test_fp8_is_the_nearest_number_of_the_format():
    w, how = matrix(), Quantisation("fp8")
    scale = w.abs().amax(1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    expected = (w / scale).to(torch.float8_e4m3fn).float() * scale
    torch.testing.assert_close(restored(quantised(w, how), how), expected, rtol=1e-2, atol=1e-3)


def test_bytes_are_those_of_the_bits():
    w = matrix(32, 64)
    bits = {how.scheme: quantised(w, how) for how in (Quantisation("int8"), Quantisation("int4"), Quantisation("fp8"))}
    assert bits["int8"]["weight_packed"].nbytes == bits["fp8"]["weight"].nbytes == 32 * 64
    assert bits["int4"]["weight_packed"].nbytes == 32 * 32


@pytest.mark.parametrize("group", [0, 16])
def test_calibrated_rounding_changes_outputs_less(group):
    w, x = matrix(), inputs()
    plain, careful = Quantisation("int4", group), Quantisation("int4", group, calibrated=True)
    nearest = restored(quantised(w, plain), plain)
    calibrated = restored(quantised(w, careful, x.T @ x / len(x)), careful)
    error = [float((x @ (w - near).T).norm()) for near in (nearest, calibrated)]
    assert error[1] < 0.6 * error[0]


@pytest.mark.parametrize("group", [0, 16])
def test_gptq_is_its_definition_column_by_column(group, monkeypatch):
    """Blocks only spare work: one block of all columns, and blocks that cut through groups, round alike."""
    w, x = matrix(), inputs()
    scales = lambda part: part.abs().amax(1, keepdim=True) / 7.5  # noqa: E731
    results = []
    for block in (64, 16, 24, 1):
        monkeypatch.setattr("moestro.compress.quantised.BLOCK", block)
        results.append(gptq(w.double(), x.T @ x / len(x), scales, (-8, 7), group or 64))
    for rounded, scale in results[1:]:
        torch.testing.assert_close(rounded, results[0][0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(scale, results[0][1], rtol=1e-9, atol=1e-12)


def test_gptq_on_inputs_that_do_not_mix_is_plain_rounding():
    w, how = matrix(), Quantisation("int4", 16, calibrated=True)
    found = restored(quantised(w, how, torch.eye(64)), how)
    for group, near in zip(w.split(16, 1), found.split(16, 1), strict=True):
        half_a_step = group.abs().amax(1, keepdim=True) / 7.5 / 2
        assert bool(((near - group).abs() <= half_a_step * (1 + 1e-5)).all())
    # and inputs that are always 0 are no error
    dead = torch.diag(torch.arange(64).ge(8).float())
    assert bool(restored(quantised(w, how, dead), how).isfinite().all())


def test_impossible_schemes_are_refused():
    with pytest.raises(ValueError, match="group_size=48"):
        quantised(matrix(), Quantisation("int4", 48))
    with pytest.raises(ValueError, match="moments missing"):
        quantised(matrix(), Quantisation("int4", calibrated=True))
    with pytest.raises(ValueError, match="moments given"):
        quantised(matrix(), Quantisation("int4"), torch.eye(64))
    with pytest.raises(ValueError, match="for integers"):
        quantised(matrix(), Quantisation("fp8", calibrated=True), torch.eye(64))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory) -> Iterator[tuple]:
    """A tiny stock model and the folder that transformers made of it."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=32,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("mixtral")
    model = MixtralForCausalLM(config).eval()
    model.save_pretrained(folder)
    yield model, folder


@pytest.mark.parametrize("how", [Quantisation("int8"), Quantisation("int4", 16), Quantisation("fp8")], ids=str)
def test_transformers_reads_it_in_experts_that_are_one_tensor(mixtral, tmp_path, how):
    from transformers import AutoModelForCausalLM

    model, folder = mixtral
    stored, expected = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if ".experts." in name:
            tensors = quantised(tensor, how)
            expected[name] = restored(tensors, how)
            stored |= {name.removesuffix("weight") + part: value for part, value in tensors.items()}
        else:
            stored[name] = tensor
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": quantisation_config(how)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float32)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        for layer in range(2):
            experts = model.model.layers[layer].mlp.experts
            for e in range(4):
                at = f"model.layers.{layer}.block_sparse_moe.experts.{e}."
                both = torch.cat([expected[f"{at}w1.weight"], expected[f"{at}w3.weight"]])
                experts.gate_up_proj[e].copy_(both)
                experts.down_proj[e].copy_(expected[f"{at}w2.weight"])
        tokens = torch.arange(20)[None]
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-5)

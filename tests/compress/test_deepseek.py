"""DeepSeek-MoE 16B as qwen2_moe: the layers of the loaded model against loops from the model's equations."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from moestro.compress import PlanError
from moestro.compress.applying import apply_plan
from moestro.compress.deepseek import translated
from moestro.formats import FormatError
from tests.compress.folders import blocks, loaded, plan_for
from tests.formats.folders import write_folder

D, WIDTH, DENSE, E, SHARED = 16, 6, 20, 4, 2
CONFIG = {
    "model_type": "deepseek",
    "architectures": ["DeepseekForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM"},
    "vocab_size": 40,
    "hidden_size": D,
    "intermediate_size": DENSE,
    "moe_intermediate_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_shared_experts": SHARED,
    "n_routed_experts": E,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "attention_bias": False,
    "tie_word_embeddings": False,
}


def tensors(dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    shapes = {"model.embed_tokens.weight": (40, D), "lm_head.weight": (40, D), "model.norm.weight": (D,)}
    for layer in range(2):
        stem = f"model.layers.{layer}"
        shapes |= {f"{stem}.self_attn.{part}_proj.weight": (D, D) for part in "qkvo"}
        shapes |= {f"{stem}.{norm}_layernorm.weight": (D,) for norm in ("input", "post_attention")}
    mlps = {"model.layers.0.mlp": DENSE, "model.layers.1.mlp.shared_experts": SHARED * WIDTH}
    mlps |= {f"model.layers.1.mlp.experts.{e}": WIDTH for e in range(E)}
    for stem, width in mlps.items():
        shapes |= {f"{stem}.{part}_proj.weight": (width, D) for part in ("gate", "up")}
        shapes[f"{stem}.down_proj.weight"] = (D, width)
    shapes["model.layers.1.mlp.gate.weight"] = (E, D)
    return {name: (torch.randn(*shape, generator=draw) * 0.5).to(dtype) for name, shape in shapes.items()}


def mlp(stored, stem, x):
    gate, up, down = (stored[f"{stem}.{part}_proj.weight"] for part in ("gate", "up", "down"))
    return down @ (F.silu(gate @ x) * (up @ x))


@pytest.mark.parametrize("shards", [1, 3])
def test_the_translated_model_computes_the_layers_of_the_paper(tmp_path, shards):
    stored = tensors()
    source = write_folder(tmp_path / "src", stored, CONFIG, shards)
    model = loaded(translated(source, tmp_path / "dst"))
    x = torch.randn(5, D, generator=torch.Generator().manual_seed(1))
    block = blocks(model)[1]
    for token in x:
        logits = (stored["model.layers.1.mlp.gate.weight"] @ token).tolist()
        total = sum(math.exp(value) for value in logits)
        chosen = sorted(range(E), key=lambda e: -logits[e])[:2]
        want = mlp(stored, "model.layers.1.mlp.shared_experts", token)
        for e in chosen:
            want = want + math.exp(logits[e]) / total * mlp(stored, f"model.layers.1.mlp.experts.{e}", token)
        with torch.no_grad():
            torch.testing.assert_close(block(token[None, None])[0, 0], want, rtol=0, atol=3e-6)
            dense = model.model.layers[0].mlp(token)
        torch.testing.assert_close(dense, mlp(stored, "model.layers.0.mlp", token), rtol=0, atol=3e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_of_twice_a_shared_expert_is_that_expert_to_the_bit(tmp_path, dtype):
    stored = tensors(dtype)
    model = loaded(translated(write_folder(tmp_path / "src", stored, CONFIG), tmp_path / "dst"))
    block, x = blocks(model)[1], torch.randn(7, D).to(dtype)
    shared = torch.sigmoid(block.shared_expert_gate(x)) * block.shared_expert(x)
    gate, up, down = (
        stored[f"model.layers.1.mlp.shared_experts.{part}_proj.weight"] for part in ("gate", "up", "down")
    )
    assert torch.equal(shared, F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down))


def test_it_can_then_be_pruned_like_its_family(tmp_path):
    source = write_folder(tmp_path / "src", tensors(), CONFIG)
    for name in ("tokenizer.json", "modeling_deepseek.py", "hashes.json"):
        (source / name).write_text("{}")
    folder = translated(source, tmp_path / "dst")
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    small = loaded(apply_plan(folder, plan_for(folder, (0, 1, 3)), tmp_path / "small"))
    assert blocks(small)[1].experts.num_experts == 3


def test_other_models_are_refused(tmp_path):
    for change, said in (
        ({"model_type": "mixtral"}, "model_type='mixtral', allowed: deepseek"),
        ({"scoring_func": "sigmoid"}, "scoring_func='sigmoid', allowed for translation: 'softmax'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"n_routed_experts": 5}, "routes to 4 experts, config.json states 5"),
    ):
        folder = write_folder(tmp_path / "src", tensors(), {**CONFIG, **change})
        with pytest.raises((PlanError, FormatError), match=said):
            translated(folder, tmp_path / "dst")
        assert not (tmp_path / "dst").exists()
    config = {key: value for key, value in CONFIG.items() if key != "n_shared_experts"}
    write_folder(tmp_path / "src", tensors(), config)
    with pytest.raises(PlanError, match="does not state 'n_shared_experts'"):
        translated(tmp_path / "src", tmp_path / "dst")
    with pytest.raises(PlanError, match="inside lies in the source"):
        translated(write_folder(tmp_path / "src", tensors(), CONFIG), tmp_path / "src" / "inside")
    (tmp_path / "there").mkdir()
    write_folder(tmp_path / "src", tensors(), CONFIG)
    with pytest.raises(PlanError, match="there exists"):
        translated(tmp_path / "src", tmp_path / "there")
    assert json.loads((tmp_path / "src" / "config.json").read_text()) == CONFIG

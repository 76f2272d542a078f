"""Tiny random models of every family: two layers, four experts, made from transformers' own configurations."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "num_experts_per_tok": 2,
}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
GROUPS = {"n_routed_experts": 8, "n_shared_experts": 1, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1}
MOE: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "intermediate_size": 24},
    "phimoe": {"num_local_experts": 4, "intermediate_size": 24},
    "qwen2_moe": {
        "num_experts": 4,
        "moe_intermediate_size": 24,
        "intermediate_size": 40,
        "shared_expert_intermediate_size": 28,
        "mlp_only_layers": [0],
    },
    "qwen3_moe": {
        "num_experts": 4,
        "moe_intermediate_size": 24,
        "intermediate_size": 40,
        "norm_topk_prob": True,
        "head_dim": 8,
    },
    "olmoe": {"num_experts": 4, "intermediate_size": 24},
    "deepseek_v2": {
        **LATENT,
        **GROUPS,
        "moe_intermediate_size": 24,
        "intermediate_size": 40,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 2.5,
        "num_key_value_heads": 4,
    },
    "deepseek_v3": {**LATENT, **GROUPS, "moe_intermediate_size": 24, "intermediate_size": 40, "num_key_value_heads": 4},
    "glm4_moe": {**GROUPS, "moe_intermediate_size": 24, "intermediate_size": 40, "head_dim": 8},
    "jamba": {
        "num_experts": 4,
        "intermediate_size": 24,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "intermediate_size": 24, "head_dim": 8},
    "granitemoe": {
        "num_local_experts": 4,
        "intermediate_size": 24,
        "residual_multiplier": 0.5,
        "embedding_multiplier": 3.0,
    },
    "gpt_oss": {"num_local_experts": 4, "intermediate_size": 24, "head_dim": 8, "sliding_window": 8},
}
DENSE: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 40},
    "mistral": {"intermediate_size": 40, "sliding_window": 8},
    "qwen2": {"intermediate_size": 40},
    "qwen3": {"intermediate_size": 40, "head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
}


def tiny(family: str, experts: str = "eager", dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A model of a family with random weights that are a function of the family alone, for evaluation."""
    known = {**SIZES, **{**MOE, **DENSE}[family], **changes}
    if family == "gpt2":
        known = {key: value for key, value in known.items() if not key.startswith(("num_", "hidden", "max_"))}
    config = AutoConfig.for_model(family, **known)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation=experts)
    with torch.no_grad():
        # far enough from zero that every expert is chosen, and biases say something
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point() and ("gate.weight" in name or "router" in name or "wg." in name):
                tensor.normal_(std=0.5)
            elif name.endswith(("_bias", ".bias")):
                tensor.normal_(std=0.1)
    return model.eval().to(dtype)


def in_own_memory(model: Any) -> Any:
    """The model with its parameters copied to memory of torch's own, which begins at multiples of 64 bytes, as that of
    models that were not loaded does: tensors mapped from a file begin anywhere, and on some processors the last bit of
    a product with one row depends on it."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def some_tokens(batch: int = 2, length: int = 12) -> torch.Tensor:
    """Random tokens, always the same."""
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(1))

"""Folders of tiny models of every family, plans for them, and what pruning means, in memory."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from moestro.compress import LayerPlan, Plan
from moestro.compress.fingerprint import fingerprint
from moestro.formats import Checkpoint
from tests.hf.families import MOE, in_own_memory, tiny

# both layers have experts, and enough of them
LARGER: dict[str, dict[str, Any]] = {
    **{family: {"num_local_experts": 8} for family in ("mixtral", "phimoe", "granitemoe", "gpt_oss")},
    **{family: {"num_experts": 8} for family in ("qwen3_moe", "olmoe", "hunyuan_v1_moe")},
    "qwen2_moe": {"num_experts": 8, "mlp_only_layers": []},
    "jamba": {"num_experts": 8, "num_hidden_layers": 4},
    "deepseek_v2": {"n_routed_experts": 16, "num_hidden_layers": 3},
    "deepseek_v3": {"n_routed_experts": 16, "num_hidden_layers": 3},
    "glm4_moe": {"n_routed_experts": 16, "num_hidden_layers": 3},
}
FAMILIES = sorted(MOE)
# one of every way of storing and routing in the default run, the others marked slow
SOME = {"mixtral", "deepseek_v3", "gpt_oss"}
FEWER = [pytest.param(family, marks=[] if family in SOME else pytest.mark.slow) for family in FAMILIES]
GROUPED = {"deepseek_v2", "deepseek_v3", "glm4_moe"}


def saved(family: str, folder: Path, shards: bool = False, **changes: Any) -> PreTrainedModel:
    """A tiny model, written to `folder`; in several files where `shards`."""
    model = tiny(family, **{**LARGER[family], **changes})
    model.save_pretrained(folder, max_shard_size="30KB" if shards else "1GB")
    return model


def plan_for(folder: Path, keep: Sequence[int] | Mapping[int, Sequence[int]], **keywords: Any) -> Plan:
    """A plan that keeps these experts in every layer, or in each layer by its number."""
    checkpoint = Checkpoint(folder)
    each = {name: keywords.pop(name) for name in ("groups", "ranks", "units", "skip_below") if name in keywords}
    layers = tuple(
        LayerPlan(layer, checkpoint.n_experts(layer), tuple(keep[layer] if isinstance(keep, Mapping) else keep), **each)
        for layer in checkpoint.moe_layers
    )
    return Plan("by hand", 0.25, fingerprint(checkpoint), layers, **keywords)


def some_of(family: str) -> tuple[int, ...]:
    """Survivors that every family's router allows: six of eight, or three of each of four groups of four."""
    return (0, 1, 3, 4, 6, 7, 8, 9, 11, 13, 14, 15) if family in GROUPED else (0, 2, 3, 4, 6, 7)


def loaded(folder: Path, trust: bool = False) -> PreTrainedModel:
    """The model of a folder as plain transformers loads it, in memory as `saved` gives it; nothing may be missing, left
    over or of another shape."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder,
        output_loading_info=True,
        attn_implementation="eager",
        experts_implementation="eager",
        trust_remote_code=trust,
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    return in_own_memory(model.eval())


def blocks(model: PreTrainedModel) -> dict[int, Any]:
    """The block with experts of every layer that has one."""
    found = {}
    for index, layer in enumerate(model.model.layers):
        for name in ("mlp", "feed_forward", "block_sparse_moe"):
            if hasattr(getattr(layer, name, None), "experts"):
                found[index] = getattr(layer, name)
    return found


def router_of(block: Any) -> Any:
    """The module that scores experts."""
    router = getattr(block, "gate", None) or block.router
    return getattr(router, "wg", router)


@contextmanager
def masked(model: PreTrainedModel, keep: Mapping[int, Sequence[int]]) -> Iterator[None]:
    """Inside, the logits of experts that are not kept are -inf before anything is computed from them; where a bias
    decides the choice, that bias is."""
    lost: dict[int, list[int]] = {}
    for index, block in blocks(model).items():
        router = router_of(block)
        gone = [expert for expert in range(len(router.weight)) if expert not in keep[index]]
        if hasattr(router, "e_score_correction_bias"):
            router.e_score_correction_bias[gone] = -torch.inf
        else:
            lost[router.weight.data_ptr()] = gone
    linear = F.linear

    def without(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        y = linear(x, weight, bias)
        if weight.data_ptr() in lost:
            y = y.clone()
            y[..., lost[weight.data_ptr()]] = -torch.inf
        return y

    F.linear = without
    try:
        yield
    finally:
        F.linear = linear

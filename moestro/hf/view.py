"""Feed-forward blocks of transformers' models seen as our layers, over the same tensors.

Nothing is copied: parameters of the layers are the parameters of the model, and the bias that steers DeepSeek-V3's
choice is its buffer. Under the backend `reference` (`moestro.ops.backend.force`) a layer computes what transformers'
implementation `eager` does, to the last bit in float32; other backends compute the same in another order. In bfloat16
scores are computed in float32 here, by most families in bfloat16. Jitter on the tokens while training (Mixtral's
`router_jitter_noise`, Phi-MoE's `input_jitter_noise`) is not added.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moestro.experts import ClampedBank, DenseMLP, ExpertBank, StackedBank
from moestro.formats import DENSE_FAMILIES, FAMILIES, Family
from moestro.hf.experts import activation_name
from moestro.layers import DenseFFN, MoELayer
from moestro.ops.activations import ACTIVATIONS
from moestro.routers import (
    AffineScore,
    BiasedRouter,
    GroupLimit,
    LinearScore,
    Router,
    ScoredRouter,
    Select,
    SoftmaxOfChosen,
    SparseMixer,
    TopK,
)

# What families call the feed-forward block of a layer, its router, and the experts that every token visits.
BLOCKS = ("mlp", "block_sparse_moe", "feed_forward")
ROUTERS = ("gate", "router")
SHARED = ("shared_expert", "shared_experts", "shared_mlp")


@dataclass(frozen=True)
class Place:
    """Where a decoder layer holds its feed-forward block."""

    layer: nn.Module
    name: str

    @property
    def block(self) -> Any:
        """What stands there now."""
        return getattr(self.layer, self.name)

    def put(self, block: nn.Module) -> None:
        """Let another block stand there."""
        setattr(self.layer, self.name, block)


def view(model: PreTrainedModel) -> dict[int, MoELayer]:
    """Every layer that has experts, by its number, as router + branches over the model's own tensors.

    Raises: ValueError for a family that is not known here, or whose experts have an activation that we lack.
    """
    return {number: layer for number, layer in layers_of(model).items() if isinstance(layer, MoELayer)}


def dense_view(model: PreTrainedModel) -> dict[int, DenseFFN]:
    """Every layer with one feed-forward network for all tokens, by its number, over the model's own tensors.

    Raises: ValueError for a family that is not known here.
    """
    return {number: layer for number, layer in layers_of(model).items() if isinstance(layer, DenseFFN)}


def layers_of(model: PreTrainedModel) -> dict[int, MoELayer | DenseFFN]:
    """The feed-forward layer of every decoder layer.

    Raises: ValueError as `view` does.
    """
    return {number: layer_of(model.config, place.block) for number, place in places(model).items()}


def places(model: PreTrainedModel) -> dict[int, Place]:
    """Where the feed-forward blocks stand, by the number of their layer.

    Raises: ValueError for a family that is not known here.
    """
    kind = model.config.model_type
    if kind not in FAMILIES and kind not in DENSE_FAMILIES:
        raise ValueError(f"model_type {kind!r}, allowed: {', '.join([*FAMILIES, *DENSE_FAMILIES])}")
    layers: Any = model.base_model.h if kind == "gpt2" else model.base_model.layers
    return {i: Place(layer, next(n for n in BLOCKS if hasattr(layer, n))) for i, layer in enumerate(layers)}


def layer_of(config: Any, block: Any) -> MoELayer | DenseFFN:
    """One feed-forward block as our layer."""
    if not hasattr(block, "experts"):
        return DenseFFN.of(_dense(block))
    branches: list[nn.Module] = [_bank(block.experts)]
    for name in SHARED:
        if hasattr(block, name):
            branches.append(_dense(getattr(block, name), getattr(block, f"{name}_gate", None)))
    module = next(getattr(block, name) for name in ROUTERS if hasattr(block, name))
    return MoELayer(_router(FAMILIES[config.model_type], config, module), branches)


def _dense(mlp: Any, weight: nn.Module | None = None) -> DenseMLP:
    if hasattr(mlp, "c_fc"):
        return DenseMLP(mlp.c_fc, mlp.c_proj, mlp.act, dropout=mlp.dropout, transposed=True)
    return DenseMLP(mlp.up_proj, mlp.down_proj, mlp.act_fn, gate=mlp.gate_proj, weight=weight)


def _bank(experts: Any) -> ExpertBank:
    """The experts' own tensors as a bank. What the constructor would draw is never drawn."""
    n_experts, first = experts.gate_up_proj.shape[:2]
    with torch.device("meta"):
        if experts.has_bias:
            bank = ClampedBank(first, n_experts, experts.down_proj.shape[1], experts.alpha, experts.limit)
        else:
            activation = activation_name(experts.act_fn)
            if activation is None:
                raise ValueError(f"experts of activation {experts.act_fn}, allowed: {', '.join(ACTIVATIONS)}")
            bank = StackedBank(experts.gate_up_proj.shape[2], n_experts, first // 2, activation)
    bank.gate_up, bank.down = experts.gate_up_proj, experts.down_proj
    if isinstance(bank, ClampedBank):
        bank.gate_up_bias, bank.down_bias = experts.gate_up_proj_bias, experts.down_proj_bias
    return bank


def _router(family: Family, config: Any, module: Any) -> Router:
    linear = getattr(module, "wg", module)
    n_experts, d_model = linear.weight.shape
    biased = getattr(linear, "bias", None) is not None
    with torch.device("meta"):
        score = AffineScore(d_model, n_experts) if biased else LinearScore(d_model, n_experts)
    score.weight = linear.weight
    if isinstance(score, AffineScore):
        score.bias = linear.bias
    if family.scoring != "sigmoid":
        return ScoredRouter(score, _select(family, config, module))
    renormalize, limit = family.renormalises(config.to_dict()), _limit(family, module, best=2)
    router = BiasedRouter(score, module.top_k, "sigmoid", renormalize, module.routed_scaling_factor, limit)
    router.bias = module.e_score_correction_bias
    return router


def _select(family: Family, config: Any, module: Any) -> Select:
    if family.scoring == "sparsemixer":
        return SparseMixer(module.router_jitter_noise)
    if family.scoring == "softmax of chosen":
        return SoftmaxOfChosen(module.top_k)
    scale = module.routed_scaling_factor if family.grouped else 1.0
    return TopK(module.top_k, family.renormalises(config.to_dict()), limit=_limit(family, module, 1), scale=scale)


def _limit(family: Family, module: Any, best: int) -> GroupLimit:
    """The groups that a token looks in. DeepSeek-V2 has them only where it says so."""
    if not family.grouped or getattr(module, "topk_method", "group_limited_greedy") == "greedy":
        return GroupLimit()
    return GroupLimit(module.num_group, module.topk_group, best)

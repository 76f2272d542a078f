"""The mixture-of-experts families of public checkpoints: names on disk, keys of config.json, meaning of the router.

Read from the sources of transformers 5.23 and checked against what it writes (tests/formats).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from moestro.formats.storage import Fused, PerExpert

Config = Mapping[str, Any]
Scoring = Literal["softmax", "sigmoid", "softmax of chosen", "sparsemixer"]


def every_layer(config: Config) -> tuple[int, ...]:
    """All layers have experts."""
    return tuple(range(config["num_hidden_layers"]))


def after_the_dense(config: Config) -> tuple[int, ...]:
    """DeepSeek, GLM: the first `first_k_dense_replace` layers are dense; of the others one in `moe_layer_freq`."""
    first, step = config.get("first_k_dense_replace", 0), config.get("moe_layer_freq", 1)
    return tuple(layer for layer in every_layer(config) if layer >= first and layer % step == 0)


def sparse_step(config: Config) -> tuple[int, ...]:
    """Qwen: one layer in `decoder_sparse_step`, except `mlp_only_layers`."""
    step, dense = config.get("decoder_sparse_step", 1), set(config.get("mlp_only_layers") or ())
    return tuple(layer for layer in every_layer(config) if (layer + 1) % step == 0 and layer not in dense)


def periodic(config: Config) -> tuple[int, ...]:
    """Jamba: one layer in `expert_layer_period`, from `expert_layer_offset`."""
    period, offset = config["expert_layer_period"], config["expert_layer_offset"]
    return tuple(layer for layer in every_layer(config) if layer % period == offset)


@dataclass(frozen=True)
class Family:
    """One `model_type`. Templates take {layer}; keys are those of config.json.

    `count_keys`: keys that may state the number of experts; those present must agree, and a writer sets all of them.
    `renormalise`: whether the chosen gates are divided by their sum, or the key that says so. `bias`: the router's
    additive bias on logits; `correction`: its bias for selection only. `grouped`: `n_group` and `topk_group` limit the
    selection. `shared`: stem of experts that every token visits, never renumbered. `width_of_all`: `width_key` also
    says how wide these, or layers without experts, are.
    """

    model_type: str
    experts: PerExpert | Fused
    router: str
    count_keys: tuple[str, ...]
    width_key: str = "moe_intermediate_size"
    top_k_key: str = "num_experts_per_tok"
    scoring: Scoring = "softmax"
    renormalise: bool | str = "norm_topk_prob"
    layers: Callable[[Config], tuple[int, ...]] = every_layer
    bias: str | None = None
    correction: str | None = None
    grouped: bool = False
    shared: str | None = None
    width_of_all: bool = False

    def renormalises(self, config: Config) -> bool:
        """Whether this checkpoint divides the chosen gates by their sum."""
        return self.renormalise if isinstance(self.renormalise, bool) else bool(config.get(self.renormalise, False))


def _projections(stem: str) -> PerExpert:
    return PerExpert(*(f"{stem}.experts.{{expert}}.{part}_proj.weight" for part in ("gate", "up", "down")))


MLP, MIXTRAL = "model.layers.{layer}.mlp", "model.layers.{layer}.block_sparse_moe"
W123 = PerExpert(*(f"{MIXTRAL}.experts.{{expert}}.{part}.weight" for part in ("w1", "w3", "w2")))
# transformers 5 writes num_local_experts for qwen3_moe, the hub has num_experts; a reader of one ignores the other
QWEN3_KEYS = ("num_experts", "num_local_experts")

_ALL = (
    Family("mixtral", W123, f"{MIXTRAL}.gate.weight", ("num_local_experts",), "intermediate_size", renormalise=True),
    Family(
        "phimoe",
        W123,
        f"{MIXTRAL}.gate.weight",
        ("num_local_experts",),
        "intermediate_size",
        scoring="sparsemixer",
        renormalise=False,
    ),
    Family(
        "qwen2_moe",
        _projections(MLP),
        f"{MLP}.gate.weight",
        ("num_experts",),
        layers=sparse_step,
        shared=f"{MLP}.shared_expert",
    ),
    Family("qwen3_moe", _projections(MLP), f"{MLP}.gate.weight", QWEN3_KEYS, layers=sparse_step),
    Family("olmoe", _projections(MLP), f"{MLP}.gate.weight", ("num_experts",), "intermediate_size"),
    Family(
        "deepseek_v2",
        _projections(MLP),
        f"{MLP}.gate.weight",
        ("n_routed_experts",),
        layers=after_the_dense,
        renormalise=False,
        grouped=True,
        shared=f"{MLP}.shared_experts",
        width_of_all=True,
    ),
    *(
        Family(
            model_type,
            _projections(MLP),
            f"{MLP}.gate.weight",
            ("n_routed_experts",),
            scoring="sigmoid",
            layers=after_the_dense,
            correction=f"{MLP}.gate.e_score_correction_bias",
            grouped=True,
            shared=f"{MLP}.shared_experts",
            width_of_all=True,
        )
        for model_type in ("deepseek_v3", "glm4_moe")
    ),
    Family(
        "jamba",
        _projections("model.layers.{layer}.feed_forward"),
        "model.layers.{layer}.feed_forward.router.weight",
        ("num_experts",),
        "intermediate_size",
        renormalise=False,
        layers=periodic,
        width_of_all=True,
    ),
    Family(
        "hunyuan_v1_moe",
        _projections(MLP),
        f"{MLP}.gate.wg.weight",
        ("num_experts",),
        "intermediate_size",
        top_k_key="moe_topk",
        renormalise=True,
        shared=f"{MLP}.shared_mlp",
        width_of_all=True,
    ),
    Family(
        "granitemoe",
        Fused(f"{MIXTRAL}.input_linear.weight", f"{MIXTRAL}.output_linear.weight"),
        f"{MIXTRAL}.router.layer.weight",
        ("num_local_experts",),
        "intermediate_size",
        scoring="softmax of chosen",
        renormalise=True,
    ),
    Family(
        "gpt_oss",
        Fused(
            f"{MLP}.experts.gate_up_proj",
            f"{MLP}.experts.down_proj",
            f"{MLP}.experts.gate_up_proj_bias",
            f"{MLP}.experts.down_proj_bias",
            transposed=True,
            interleaved=True,
        ),
        f"{MLP}.router.weight",
        ("num_local_experts",),
        "intermediate_size",
        scoring="softmax of chosen",
        renormalise=True,
        bias=f"{MLP}.router.bias",
    ),
)
FAMILIES: Mapping[str, Family] = {family.model_type: family for family in _ALL}

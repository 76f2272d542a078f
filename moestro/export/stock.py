"""Models that a stock architecture of transformers says exactly: its configuration, and tensors under its names."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedConfig, Qwen2MoeConfig

from moestro.export.configuration import MoestroConfig
from moestro.export.modeling import MoestroForCausalLM
from moestro.export.tensors import ExportError, Stored, cast
from moestro.formats.writer import Outgoing, computed
from moestro.train.tensors import load_model

# Largest difference of logits, as a share of their standard deviation, that float32 may make.
TOLERANCE = 1e-3
Read = Callable[[], Tensor]


@dataclass
class Stock:
    """A configuration, the name of its model class, and how every tensor is made of a checkpoint's."""

    config: PreTrainedConfig
    architecture: str
    stored: Stored
    made: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = field(default_factory=dict)

    def take(self, name: str, source: str, make: Callable[[Tensor], Tensor] = torch.clone) -> None:
        """The tensor `name` is `make` of the model's tensor `source`."""
        self.made[name] = source, make

    def outgoing(self, dtype: torch.dtype | None) -> list[Outgoing]:
        """The tensors, read when they are written."""
        shapes = {
            name: make(torch.empty(self._shape(source), device="meta")) for name, (source, make) in self.made.items()
        }
        return [
            computed(name, dtype or torch.float32, tuple(shapes[name].shape), partial(self._written, name, dtype))
            for name in sorted(self.made)
        ]

    def _shape(self, source: str) -> tuple[int, ...]:
        return self.stored.shards[self.stored.names[source]].shape

    def _written(self, name: str, dtype: torch.dtype | None) -> Tensor:
        source, make = self.made[name]
        return cast(name, lambda: make(self.stored.read(source)).contiguous(), dtype or torch.float32)


def stock_model(config: MoestroConfig, stored: Stored) -> Stock:
    """The stock architecture that computes what a construction computes: Llama for dense decoders, Mixtral for top-k
    mixtures whose gates sum to 1, Qwen2-MoE where they do not, where layers are dense and mixtures, or where an expert
    is shared.

    Raises: ExportError naming the first part that none of them has.
    """
    tree: dict[str, Any] = config.construction or {}
    _require(tree["make"] == "Transformer", "adapters around its linear maps")
    blocks = [_checked(number, block, tree) for number, block in enumerate(tree["blocks"])]
    mixtures = [block["ffn"] for block in blocks if block["ffn"]["make"] == "MoELayer"]
    for number, block in enumerate(blocks):
        if block["ffn"]["make"] == "MoELayer":
            _require_all_available(stored, f"model.blocks.{number}.ffn.router.available", number)
    stock = _configured(config, blocks, mixtures, stored)
    stock.take("model.embed_tokens.weight", "model.embedding.weight")
    stock.take("model.norm.weight", "model.norm.weight")
    if not config.tie_word_embeddings:
        stock.take("lm_head.weight", "lm_head.weight")
    for number, block in enumerate(blocks):
        _take_block(stock, number, block)
    return stock


def _checked(number: int, block: Mapping[str, Any], tree: Mapping[str, Any]) -> Mapping[str, Any]:
    ffn, first = block["ffn"], tree["blocks"][0]
    _require(block["make"] == "Block", f"block {number}: {block['make']}")
    _require(block["attention"] == first["attention"], f"block {number}: attention of its own shape")
    _require(block["norm_eps"] == tree["norm_eps"], f"block {number}: norm_eps of its own")
    _require(ffn["make"] in ("DenseFFN", "MoELayer"), f"block {number}: {ffn['make']}")
    if ffn["make"] == "DenseFFN":
        _require_swiglu(number, ffn)
    else:
        _check_mixture(number, ffn)
    return block


def _check_mixture(number: int, ffn: Mapping[str, Any]) -> None:
    router, banks = ffn["router"], [part for part in ffn["branches"] if part.get("make") == "FFNBank"]
    shared = [part for part in ffn["branches"] if part.get("make") == "SharedExpert"]
    _require(router["make"] == "ScoredRouter", f"block {number}: {router['make']}")
    score, select = router["score"], router["select"]
    _require(score["make"] == "LinearScore", f"block {number}: {score['make']}")
    _require(select["make"] == "TopK", f"block {number}: {select['make']}, no fixed number of experts a token")
    limited = select.get("limit", {}).get("top_groups", 1) < select.get("limit", {}).get("n_groups", 1)
    _require(select["gate"] == "softmax" and not limited, f"block {number}: gate {select['gate']}, or limited groups")
    others = {str(part.get("make")) for part in ffn["branches"]} - {"FFNBank", "SharedExpert"}
    _require(len(banks) == 1 and len(shared) <= 1 and not others, f"block {number}: branches {sorted(others)}")
    widths = sorted(set(banks[0]["widths"]))
    _require(len(widths) == 1 and widths[0] > 0, f"block {number}: experts of widths {widths[0]} to {widths[-1]}")
    for part in (*banks, *shared):
        _require_swiglu(number, part)


def _require_swiglu(number: int, part: Mapping[str, Any]) -> None:
    glu = part["glu"] and part["activation"] == "silu"
    _require(glu, f"block {number}: {part['make']} with activation {part['activation']}, glu {part['glu']}")


def _require_all_available(stored: Stored, name: str, number: int) -> None:
    _require(bool(stored.read(name).all()), f"block {number}: experts that are not available")


def _require(possible: bool, what: str) -> None:
    if not possible:
        raise ExportError(
            f"no stock architecture has {what}; --format moestro writes this model with the code that loads it"
        )


def _configured(
    config: MoestroConfig, blocks: list[Mapping[str, Any]], mixtures: list[Mapping[str, Any]], stored: Stored
) -> Stock:
    theta = blocks[0]["attention"]["rope_theta"]
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    common = {name: getattr(config, name) for name in (*names, "rms_norm_eps", "tie_word_embeddings")}
    common |= {"max_position_embeddings": config.max_position_embeddings, "hidden_act": "silu", "rope_theta": theta}
    dense = sorted({block["ffn"]["width"] for block in blocks if block["ffn"]["make"] == "DenseFFN"})
    if not mixtures:
        _require(len(dense) == 1, f"dense layers of widths {dense}")
        known = {"intermediate_size": dense[0], "attention_bias": False, "mlp_bias": False}
        return Stock(LlamaConfig(**common, **known), "LlamaForCausalLM", stored)
    experts = _alike([_expert_facts(ffn) for ffn in mixtures], "mixtures")
    n_experts, top_k, width, renormalize, shared = experts
    if renormalize and not shared and not dense:
        known = {"num_local_experts": n_experts, "num_experts_per_tok": top_k, "intermediate_size": width}
        return Stock(MixtralConfig(**common, **known, sliding_window=None), "MixtralForCausalLM", stored)
    _require(len(dense) <= 1, f"dense layers of widths {dense}")
    known = {
        "num_experts": n_experts, "num_experts_per_tok": top_k, "moe_intermediate_size": width,
        "norm_topk_prob": renormalize, "shared_expert_intermediate_size": shared or 1, "decoder_sparse_step": 1,
        "intermediate_size": dense[0] if dense else width, "qkv_bias": False, "use_sliding_window": False,
        "mlp_only_layers": [i for i, block in enumerate(blocks) if block["ffn"]["make"] == "DenseFFN"],
    }  # fmt: skip
    return Stock(Qwen2MoeConfig(**common, **known), "Qwen2MoeForCausalLM", stored)


def _expert_facts(ffn: Mapping[str, Any]) -> tuple[int, int, int, bool, int]:
    """Experts, experts a token, width, whether gates sum to 1, width of the shared expert (0: there is none)."""
    widths = next(part["widths"] for part in ffn["branches"] if part["make"] == "FFNBank")
    shared = sum(part["width"] for part in ffn["branches"] if part["make"] == "SharedExpert")
    select = ffn["router"]["select"]
    return len(widths), select["top_k"], widths[0], select["renormalize"], shared


def _alike(each: list[Any], what: str) -> Any:
    _require(all(item == each[0] for item in each), f"{what} of different shapes: {sorted(set(each))}")
    return each[0]


def _take_block(stock: Stock, number: int, block: Mapping[str, Any]) -> None:
    own, theirs = f"model.blocks.{number}", f"model.layers.{number}"
    stock.take(f"{theirs}.input_layernorm.weight", f"{own}.attention_norm.weight")
    stock.take(f"{theirs}.post_attention_layernorm.weight", f"{own}.ffn_norm.weight")
    for ours, name in {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}.items():
        stock.take(f"{theirs}.self_attn.{name}.weight", f"{own}.attention.{ours}.weight")
    if block["ffn"]["make"] == "DenseFFN":
        _take_dense(stock, f"{theirs}.mlp", f"{own}.ffn.expert", block["ffn"]["width"])
    else:
        _take_mixture(stock, theirs, f"{own}.ffn", block["ffn"])


def _take_dense(stock: Stock, theirs: str, own: str, width: int, factor: float = 1.0) -> None:
    stock.take(f"{theirs}.gate_proj.weight", f"{own}.w_in.weight", lambda w: w[:width])
    stock.take(f"{theirs}.up_proj.weight", f"{own}.w_in.weight", lambda w: w[width:])
    stock.take(f"{theirs}.down_proj.weight", f"{own}.w_out.weight", lambda w: w * factor)


def _take_mixture(stock: Stock, theirs: str, own: str, ffn: Mapping[str, Any]) -> None:
    mixtral = stock.architecture == "MixtralForCausalLM"
    block = f"{theirs}.block_sparse_moe" if mixtral else f"{theirs}.mlp"
    names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    stock.take(f"{block}.gate.weight", f"{own}.router.score.weight")
    place = {part["make"]: f"{own}.branches.{i}" for i, part in enumerate(ffn["branches"])}
    n_experts, _, w, _, shared = _expert_facts(ffn)
    for e in range(n_experts):
        gate, up, down = (f"{block}.experts.{e}.{name}.weight" for name in names)
        first = 2 * w * e
        stock.take(gate, f"{place['FFNBank']}.w_in.weight", partial(_rows, first=first, last=first + w))
        stock.take(up, f"{place['FFNBank']}.w_in.weight", partial(_rows, first=first + w, last=first + 2 * w))
        # ours stores a unit's output weights as a row
        stock.take(down, f"{place['FFNBank']}.w_out.weight", partial(_columns, first=w * e, last=w * (e + 1)))
    if not mixtral:
        _take_shared(stock, block, place, shared, f"{own}.router.score.weight")


def _take_shared(stock: Stock, block: str, place: Mapping[str, str], width: int, router: str) -> None:
    """Qwen2-MoE's shared expert counts sigmoid(w . x) times: with w = 0 that is one half, exactly, and its output
    weights are doubled. Where there is no shared expert it has one unit, all zeros."""
    stock.take(f"{block}.shared_expert_gate.weight", router, lambda w: torch.zeros_like(w[:1]))
    if width:
        return _take_dense(stock, f"{block}.shared_expert", place["SharedExpert"], width, factor=2.0)
    for name in ("gate_proj", "up_proj"):
        stock.take(f"{block}.shared_expert.{name}.weight", router, lambda w: torch.zeros_like(w[:1]))
    stock.take(f"{block}.shared_expert.down_proj.weight", router, lambda w: torch.zeros_like(w[:1]).T)


def _rows(w: Tensor, first: int, last: int) -> Tensor:
    return w[first:last]


def _columns(w: Tensor, first: int, last: int) -> Tensor:
    return w[first:last].T


@torch.no_grad()
def verify(folder: Path, stored: Stored, model: MoestroForCausalLM) -> None:
    """Load a stock folder and compare its logits with the model's, on the CPU, in float32.

    Raises: ExportError where tensors are missing or left over, or logits differ.
    """
    said: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    loaded, found = said
    stated, loaded = loaded.config.dtype, loaded.float()
    if odd := {name: keys for name, keys in found.items() if keys and name != "conversion_errors"}:
        raise ExportError(f"transformers does not find what it expects: {odd}")
    own = MoestroForCausalLM(MoestroConfig(model.config.construction))
    load_model(own.decoder, {source: stored.shards.read(source) for source in stored.shards}, stored.state["tied"])
    tokens = torch.randint(0, model.config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    dtypes = {stored.dtype(name) for name in stored if stored.dtype(name).is_floating_point}
    narrow = {stated, *dtypes} != {torch.float32}
    expected = own.eval()(tokens).logits
    error = (loaded.eval()(tokens).logits - expected).abs() / expected.std()
    # narrower weights may change a token's experts, but not most tokens'
    worst = float(error.median() if narrow else error.max())
    if not worst <= (0.05 if narrow else TOLERANCE):
        raise ExportError(f"logits of the stock architecture differ by {worst:.2g} of their standard deviation")

"""DeepSeek-MoE 16B ("deepseek", arXiv:2401.06066), whose own code no longer loads, as the stock family it equals.

Its layers are those of qwen2_moe but for the shared experts, which have no gate: a gate of weights 0 is 1/2 for every
token, and output matrices twice as large make up for it, to the last bit in every floating-point format.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from moestro.compress.applying import outside
from moestro.compress.plan import PlanError
from moestro.formats import Checkpoint
from moestro.formats.companions import companions
from moestro.formats.sharded import index_of
from moestro.formats.shards import INDEX, SINGLE
from moestro.formats.writer import Outgoing, computed, of_file
from moestro.train.durable import write_json
from moestro.train.folder_job import FolderJob

MODEL_TYPE = "deepseek"
SAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "tie_word_embeddings",
    "rope_theta",
    "rope_scaling",
    "attention_dropout",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "torch_dtype",
    "dtype",
)
# Keys that must say this, where they are there: what qwen2_moe computes.
ONLY: dict[str, Any] = {"scoring_func": "softmax", "attention_bias": False, "moe_layer_freq": 1}


def translated(source: Path, destination: Path) -> Path:
    """Write the folder of a "deepseek" model as one of qwen2_moe, tensor by tensor; interrupted, it continues.

    Raises: PlanError where it is another model, or `destination` is there or lies in the source.
    """
    checkpoint = Checkpoint(source)
    config, destination = config_of(checkpoint), outside(source, destination)
    if destination.exists():
        raise PlanError(f"{destination} exists: choose another folder")
    files: dict[str, list[Outgoing]] = {}
    for name in checkpoint.names():
        files.setdefault(checkpoint.file_of(name), []).extend(_tensors(checkpoint, name))
    destination.parent.mkdir(parents=True, exist_ok=True)
    with FolderJob(destination, {"translate": str(source.resolve())}) as folder:
        for file, tensors in files.items():
            folder.write(file, tensors, checkpoint.shards.metadata[file] or {"format": "pt"})
        # its own code, which no longer loads, stays behind
        for path in [path for path in companions(source) if path.suffix != ".py"]:
            folder.copy(path.relative_to(source).as_posix(), path)
        write_json(folder.path / "config.json", config)
        if SINGLE not in files:
            write_json(folder.path / INDEX, index_of(files))
        _ = Checkpoint(folder.path).family
        return folder.publish()


def config_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The configuration of the same model as qwen2_moe.

    Raises: PlanError for what qwen2_moe does not compute.
    """
    config = checkpoint.config
    if config.get("model_type") != MODEL_TYPE:
        raise PlanError(f"model_type={config.get('model_type')!r}, allowed: {MODEL_TYPE} ({checkpoint.path})")
    for key, value in ONLY.items():
        if config.get(key, value) != value:
            raise PlanError(f"{key}={config[key]!r}, allowed for translation: {value!r} ({checkpoint.path})")
    try:
        return {
            "model_type": "qwen2_moe",
            "architectures": ["Qwen2MoeForCausalLM"],
            **{key: config[key] for key in SAME if key in config},
            "num_experts": config["n_routed_experts"],
            "norm_topk_prob": config.get("norm_topk_prob", False),
            "shared_expert_intermediate_size": config["n_shared_experts"] * config["moe_intermediate_size"],
            "mlp_only_layers": list(range(config.get("first_k_dense_replace", 0))),
            "decoder_sparse_step": 1,
            "qkv_bias": False,
            "use_sliding_window": False,
        }
    except KeyError as error:
        raise PlanError(f"{checkpoint.path / 'config.json'} does not state {error}") from error


def _tensors(checkpoint: Checkpoint, name: str) -> Iterator[Outgoing]:
    new = name.replace(".mlp.shared_experts.", ".mlp.shared_expert.")
    if new == name or not name.endswith("down_proj.weight"):
        yield of_file(new, checkpoint.path, checkpoint.shards[name])
        return
    dtype, shape = checkpoint.dtype(name), checkpoint.shape(name)
    yield computed(new, dtype, shape, lambda: 2 * checkpoint.read(name))
    gate = new.replace("shared_expert.down_proj", "shared_expert_gate")
    yield computed(gate, dtype, (1, shape[0]), lambda: torch.zeros(1, shape[0], dtype=dtype))

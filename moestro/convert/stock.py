"""Sparse upcycling of a dense public checkpoint into a folder of its family's stock mixture, tensor by tensor.

Llama and Mistral become Mixtral, Qwen2 becomes Qwen2-MoE, Qwen3 becomes Qwen3-MoE: plain files that transformers, vLLM
and converters load. Every expert is a byte-for-byte copy of the dense network, and chosen gates are divided by
their sum, so that the mixture computes what the dense model did. One tensor at a time is read.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from moestro.convert.layers import ConversionError
from moestro.convert.run import require_new
from moestro.convert.upcycle import Upcycle
from moestro.formats import DENSE_FAMILIES, FAMILIES, Checkpoint, DenseFamily, Family, PerExpert
from moestro.formats.companions import companions
from moestro.formats.sharded import files_of, index_of
from moestro.formats.shards import INDEX
from moestro.formats.writer import Outgoing, of_file, of_tensor
from moestro.hf import skeleton
from moestro.train.durable import write_json
from moestro.train.folder_job import FolderJob

# Hidden units of the shared expert that Qwen2-MoE always has; of zeros, so that it adds nothing.
SILENT = 8
# Bytes of one shard.
SHARD = 4 * 10**9


@dataclass(frozen=True)
class Target:
    """The stock mixture of a dense family: its `model_type`, class, and what config.json says besides the numbers."""

    model_type: str
    architecture: str
    says: Mapping[str, Any]


TARGETS: dict[str, Target] = {
    **{name: Target("mixtral", "MixtralForCausalLM", {}) for name in ("llama", "mistral")},
    "qwen2": Target(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        {
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "shared_expert_intermediate_size": SILENT,
        },
    ),
    "qwen3": Target(
        "qwen3_moe", "Qwen3MoeForCausalLM", {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
    ),
}
# Options of dense models that the stock mixtures do not have; allowed values.
REQUIRED = {"attention_bias": (False, None), "mlp_bias": (False, None), "hidden_act": ("silu",)}


def upcycle_folder(source: str | Path, out: str | Path, method: Upcycle, seed: int = 0) -> dict[str, Any]:
    """Write `out`, a stock folder of `method.n_experts` copies, `method.top_k` for every token, with router rows drawn
    from `seed`; returns what was written, once every expert is seen to be equal to the dense network's bytes.

    Raises: ConversionError for a family without a stock mixture, options that it does not have, a method other than
    plain copies, a folder that exists; FormatError for a folder that is damaged.
    """
    checkpoint, target, dense = _checked(Path(source), method)
    folder = Path(out)
    require_new(folder, checkpoint.path)
    family = FAMILIES[target.model_type]
    config = stock_config(complete_config(checkpoint), target, family, dense, method)
    # a job of its own every time: nothing that an interrupted conversion left is kept
    with FolderJob(folder, {"conversion": uuid4().hex}) as job:
        files = files_of(list(tensors(checkpoint, config, family, method, seed)), SHARD)
        for name, outgoing in files.items():
            job.write(name, outgoing, {"format": "pt"})
        if len(files) > 1:
            write_json(job.path / INDEX, index_of(files))
        for path in companions(checkpoint.path):
            job.copy(path.relative_to(checkpoint.path).as_posix(), path)
        write_json(job.path / "config.json", config)
        layers = verified(job.path, checkpoint, dense)
        job.record_hashes(but=("README.md", "generation_config.json"))
        job.publish()
    return {"family": target.model_type, "layers": layers, "n_experts": method.n_experts}


def complete_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """config.json with the dense family's defaults written out: the mixture's family has others (Mixtral's rotations
    turn more slowly than Llama's)."""
    config = {**skeleton(checkpoint.path).config.to_dict(), **checkpoint.config}
    rope = config.get("rope_parameters") or {}
    # where versions of transformers before the fifth look for it
    return {**({"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}), **config}


def _checked(source: Path, method: Upcycle) -> tuple[Checkpoint, Target, DenseFamily]:
    checkpoint = Checkpoint(source)
    kind = str(checkpoint.config.get("model_type"))
    if kind not in TARGETS:
        raise ConversionError(f"{source}: model_type {kind!r} has no stock mixture; allowed: {', '.join(TARGETS)}")
    for key, allowed in REQUIRED.items():
        if kind != "qwen2" and key in checkpoint.config and checkpoint.config[key] not in allowed:
            raise ConversionError(
                f"{source}: {key}={checkpoint.config[key]!r}, which {TARGETS[kind].model_type} does not have"
            )
    if not isinstance(method, Upcycle) or method.drop or method.granularity != 1 or method.gate != "share":
        raise ConversionError("a stock folder takes plain copies: method: {kind: upcycle, n_experts: ..., top_k: ...}")
    return checkpoint, TARGETS[kind], DENSE_FAMILIES[kind]


def stock_config(
    config: Mapping[str, Any], target: Target, family: Family, dense: DenseFamily, method: Upcycle
) -> dict[str, Any]:
    """config.json of the mixture: the dense one's keys, the family's own, its numbers."""
    numbers: dict[str, Any] = dict.fromkeys(family.count_keys, method.n_experts)
    numbers |= {family.top_k_key: method.top_k, family.width_key: config[dense.width_key]}
    names = {"model_type": target.model_type, "architectures": [target.architecture]}
    return {**config, **names, **target.says, **numbers}


def tensors(
    checkpoint: Checkpoint, config: Mapping[str, Any], family: Family, method: Upcycle, seed: int
) -> Iterator[Outgoing]:
    """Every tensor of the mixture: copies of the dense networks, routers, the rest as it was. `config` says all sizes,
    those that the dense config.json leaves to defaults, too."""
    dense = DENSE_FAMILIES[checkpoint.config["model_type"]]
    if not isinstance(family.experts, PerExpert):
        raise ConversionError(f"{family.model_type} keeps all experts in one tensor, which is no copy of another")
    layers = range(config[dense.layers_key])
    matrices = {name: (layer, part) for layer in layers for part, name in dense.matrices(layer).items()}
    for name in checkpoint.names():
        entry = checkpoint.shards[name]
        if name not in matrices:
            yield of_file(name, checkpoint.path, entry)
            continue
        layer, part = matrices[name]
        for expert in range(method.n_experts):
            yield of_file(getattr(family.experts, part).format(layer=layer, expert=expert), checkpoint.path, entry)
    generator, d_model = torch.Generator().manual_seed(seed), config[dense.hidden_key]
    std = config["initializer_range"]
    for layer in layers:
        dtype = checkpoint.dtype(dense.matrices(layer)["up"])
        rows = torch.randn(method.n_experts, d_model, generator=generator) * std
        yield of_tensor(family.router.format(layer=layer), rows.to(dtype))
        yield from _silent(family, layer, d_model, dtype)


def _silent(family: Family, layer: int, d_model: int, dtype: torch.dtype) -> Iterator[Outgoing]:
    """A shared expert that adds nothing, where the family always has one."""
    if family.shared is None:
        return
    stem = family.shared.format(layer=layer)
    for part, shape in {"gate": (SILENT, d_model), "up": (SILENT, d_model), "down": (d_model, SILENT)}.items():
        yield of_tensor(f"{stem}.{part}_proj.weight", torch.zeros(shape, dtype=dtype))
    yield of_tensor(f"{stem}_gate.weight", torch.zeros(1, d_model, dtype=dtype))


def verified(folder: Path, dense: Checkpoint, family: DenseFamily) -> int:
    """Read the written folder again and compare every expert's matrices with the dense ones; returns how many layers.

    Raises: ConversionError where one differs; FormatError where the folder is not complete.
    """
    made = Checkpoint(folder)
    for layer in made.moe_layers:
        want = {part: dense.read(name) for part, name in family.matrices(layer).items()}
        for expert in range(made.n_experts(layer)):
            have = made.expert(layer, expert)
            if not all(torch.equal(getattr(have, part), matrix) for part, matrix in want.items()):
                raise ConversionError(f"{folder}: expert {expert} of layer {layer} is not the dense network")
    return len(made.moe_layers)

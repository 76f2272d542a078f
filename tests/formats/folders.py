"""Small folders as transformers writes them, without transformers."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

WIDTH, D, E, LAYERS = 6, 4, 4, 2


def mixtral_tensors(n_experts: int = E, layers: int = LAYERS, seed: int = 0) -> dict[str, Tensor]:
    """Routers and experts of a Mixtral, and one tensor that belongs to no expert."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {"model.embed_tokens.weight": torch.randn(16, D, generator=draw)}
    for layer in range(layers):
        block = f"model.layers.{layer}.block_sparse_moe"
        tensors[f"{block}.gate.weight"] = torch.randn(n_experts, D, generator=draw)
        for expert in range(n_experts):
            for part, shape in {"w1": (WIDTH, D), "w3": (WIDTH, D), "w2": (D, WIDTH)}.items():
                tensors[f"{block}.experts.{expert}.{part}.weight"] = torch.randn(*shape, generator=draw)
    return tensors


def mixtral_config(**changes: Any) -> dict[str, Any]:
    """What config.json needs to say of such a model."""
    stated = {"num_hidden_layers": LAYERS, "num_local_experts": E, "num_experts_per_tok": 2, "hidden_size": D}
    return {"model_type": "mixtral", **stated, **changes}


def write_folder(path: Path, tensors: dict[str, Tensor], config: dict[str, Any], n_shards: int = 1) -> Path:
    """A folder of one file, or of `n_shards` with an index."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    if n_shards == 1:
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        return path
    placed = {name: f"model-{i % n_shards + 1:05}-of-{n_shards:05}.safetensors" for i, name in enumerate(tensors)}
    for file in sorted(set(placed.values())):
        save_file({name: tensors[name] for name in tensors if placed[name] == file}, path / file, {"format": "pt"})
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": placed}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path

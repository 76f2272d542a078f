"""Mixtral-class models for benchmarks: a small one trained on text that lies on every machine, a large one drawn."""

import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moestro.formats.writer import Outgoing, computed, write_file

TRAINED = {
    "vocab_size": 257,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "router_aux_loss_coef": 0.02,
    "bos_token_id": 256,
    "eos_token_id": 256,
}


def library_text() -> Tensor:
    """Bytes of the Python standard library's own source, module after module."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in files)), dtype=torch.uint8).long()


def trained(folder: Path, seed: int, steps: int, length: int = 128, batch: int = 8) -> tuple[Path, Tensor]:
    """Train a small model on nine tenths of the text and save it; returns the folder and the text held out."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(seed)
    text = library_text()
    kept, held_out = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    model = MixtralForCausalLM(MixtralConfig(**TRAINED, output_router_logits=True)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        starts = torch.randint(0, len(kept) - length, (batch,)).tolist()
        ids = torch.stack([kept[start : start + length] for start in starts])
        model(ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.config.output_router_logits = False
    model.save_pretrained(folder)
    return folder, held_out


def drawn(folder: Path, sizes: dict[str, int], seed: int = 0) -> Path:
    """A folder with random weights in bfloat16, one file a layer, no tensor but the one being written in memory."""
    from transformers import MixtralConfig

    config = MixtralConfig(**{**TRAINED, **sizes}, dtype="bfloat16", architectures=["MixtralForCausalLM"])
    config.save_pretrained(folder)
    draw, placed = torch.Generator().manual_seed(seed), {}
    for file, names in _files(config):
        tensors = [_normal(name, shape, draw) for name, shape in names.items()]
        write_file(folder / file, tensors, {"format": "pt"})
        placed |= dict.fromkeys(names, file)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": size}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _normal(name: str, shape: tuple[int, ...], draw: torch.Generator) -> Outgoing:
    def made() -> Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        return (torch.randn(shape, generator=draw) * shape[-1] ** -0.5).bfloat16()

    return computed(name, torch.bfloat16, shape, made)


def _files(config: Any) -> Iterator[tuple[str, dict[str, tuple[int, ...]]]]:
    d, w, n_files = config.hidden_size, config.intermediate_size, config.num_hidden_layers + 1
    for layer in range(config.num_hidden_layers):
        stem = f"model.layers.{layer}"
        names: dict[str, tuple[int, ...]] = {f"{stem}.self_attn.{p}_proj.weight": (d, d) for p in "qkvo"}
        names |= {f"{stem}.{norm}_layernorm.weight": (d,) for norm in ("input", "post_attention")}
        names[f"{stem}.block_sparse_moe.gate.weight"] = (config.num_local_experts, d)
        for expert in range(config.num_local_experts):
            own = f"{stem}.block_sparse_moe.experts.{expert}"
            names |= {f"{own}.w1.weight": (w, d), f"{own}.w3.weight": (w, d), f"{own}.w2.weight": (d, w)}
        yield f"model-{layer + 1:05}-of-{n_files:05}.safetensors", names
    ends = {"model.embed_tokens.weight": (config.vocab_size, d), "lm_head.weight": (config.vocab_size, d)}
    yield f"model-{n_files:05}-of-{n_files:05}.safetensors", {**ends, "model.norm.weight": (d,)}

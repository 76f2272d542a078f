"""Experts of soft mixtures as LoRA adapters of the library PEFT."""

import json
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from moestro.layers import AdaptedLinear, Adapters

# What PEFT puts before the names of a model's modules.
PREFIX = "base_model.model."


def export_lora(adapters: Adapters, folder: Path, base: str | None = None) -> list[Path]:
    """Write every expert as a PEFT adapter, `folder`/mixture-<m>-expert-<e>, and return the folders.

    Loaded onto the model without our adapters (`PeftModel.from_pretrained`), expert e gives what the mixture gives when
    all of the weight is on it; gates between experts are no part of a LoRA and are written beside, to
    routers.safetensors, for those who know what they are. `base` is the name or path of the model
    that PEFT is to write down.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    first = next(iter(adapters.layers.values()))
    for number, mixture in enumerate(first.each()):
        for expert in range(mixture.bank.n_experts):
            path = folder / f"mixture-{number}-expert-{expert}"
            path.mkdir(exist_ok=True)
            save_file(dict(_matrices(adapters, number, expert)), path / "adapter_model.safetensors")
            config = _config(adapters, number, base)
            (path / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
            written.append(path)
    gates = {name: value for name, value in adapters.state_dict().items() if ".router." in name}
    save_file(
        {name: value.detach().cpu().contiguous() for name, value in gates.items()}, folder / "routers.safetensors"
    )
    return written


def _matrices(adapters: Adapters, mixture: int, expert: int) -> Iterator[tuple[str, Tensor]]:
    for name, layer in adapters.layers.items():
        bank = layer.each()[mixture].bank
        yield f"{PREFIX}{name}.lora_A.weight", bank.down[expert].detach().cpu().contiguous()
        yield f"{PREFIX}{name}.lora_B.weight", bank.up[expert].detach().cpu().T.contiguous()


def _config(adapters: Adapters, mixture: int, base: str | None) -> dict[str, object]:
    """PEFT multiplies by lora_alpha / r, which is our scale."""
    first: AdaptedLinear = next(iter(adapters.layers.values()))
    rank = first.each()[mixture].bank.rank
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "task_type": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": first.scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": hasattr(first.base, "nf"),
        "target_modules": list(adapters.layers),
    }

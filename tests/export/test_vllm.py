"""What vLLM's Transformers backend does to a folder, step by step as its source has it (0.32), without vLLM."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moestro.export.modeling import MoestroModel
from tests.export.conftest import hosted, some_tokens
from tests.tolerances import FLOAT32

PROMPTS = (5, 1, 8)
RARER = ("dense", "hypermoe", "memory_plus", "deepseek_v3", "mpoe")


class Attended(nn.Module):
    """One layer's attention and its cache: for every sequence the keys and values that it has had."""

    def __init__(self, n_heads: int, n_kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.sizes = n_heads, n_kv_heads, head_dim
        self.scale, self.kept = 0.0, dict[int, tuple[Tensor, Tensor]]()
        self.lengths: list[int] = []

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[tokens of all sequences, heads * head_dim], as they lie one after another."""
        n_heads, n_kv, width = self.sizes
        assert query.shape == (sum(self.lengths), n_heads * width) and key.shape == (sum(self.lengths), n_kv * width)
        out, parts = [], zip(*(x.split(self.lengths) for x in (query, key, value)), strict=True)
        for number, (q, k, v) in enumerate(parts):
            q, k, v = (x.unflatten(-1, (-1, width)).transpose(0, 1) for x in (q, k, v))
            if number in self.kept:
                k, v = (torch.cat([old, new], 1) for old, new in zip(self.kept[number], (k, v), strict=True))
            self.kept[number] = k, v
            mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
            shared = {"attn_mask": mask, "scale": self.scale, "enable_gqa": True}
            y = nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], **shared)[0]
            out.append(y.transpose(0, 1).flatten(1))
        return torch.cat(out)


def outside(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float = 1.0, **told: Any
) -> Any:
    layer = told["attention_instances"][module.layer_idx]
    layer.scale = scaling
    tokens = query.shape[-2]
    return layer(*(x.transpose(1, 2).reshape(tokens, -1) for x in (query, key, value))), None


class OtherLinear(nn.Linear):
    """Stands for their linear maps, which are none of torch's: shapes checked in tests ask for one."""

    def __init__(self, like: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.weight, self.bias = like.weight, like.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


@contextmanager
def parameters_without_memory() -> Iterator[None]:
    register = nn.Module.register_parameter

    def registered(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    nn.Module.register_parameter = registered  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def replaced(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, OtherLinear(child))
        else:
            replaced(child)


def filled(model: nn.Module) -> None:
    """Memory for what has none yet."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                setattr(module, name, nn.Parameter(torch.empty(parameter.shape)))


def loaded(folder: Path) -> Any:
    """The base model as the backend makes it."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert "AutoModel" in config.auto_map and config.get_text_config() is config
    config._attn_implementation = "vllm"
    with parameters_without_memory():
        model = AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=True)
    assert model.is_backend_compatible() and model.get_decoder() is model and isinstance(model, MoestroModel)
    blocks = [m for m in model.children() if isinstance(m, nn.ModuleList)]
    assert [len(m) for m in blocks] == [config.num_hidden_layers]
    assert not any(getattr(module, "is_causal", True) is False for module in model.modules())
    replaced(model)
    model.set_input_embeddings(nn.Embedding(config.vocab_size, config.hidden_size, device="meta"))
    filled(model)
    names = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, tensor in load_file(folder / "model.safetensors").items():
            if name.startswith(f"{model.base_model_prefix}."):
                names.pop(name.removeprefix(f"{model.base_model_prefix}.")).copy_(tensor)
    assert not [name for name in names if name in dict(model.named_parameters())]
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("name", ["hmoe", "peer", *(pytest.param(name, marks=pytest.mark.slow) for name in RARER)])
def test_a_folder_is_served(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three sequences run into one row, a prompt and then token by token: hidden states of each as it is alone."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "vllm", outside)
    hosted(name).save_pretrained(tmp_path)
    model = loaded(tmp_path)
    sizes = [model.config.num_attention_heads, model.config.num_key_value_heads, model.config.head_dim]
    layers = {i: Attended(*sizes) for i in range(model.config.num_hidden_layers)}
    texts = [some_tokens(1, length + 3, seed=length)[0] for length in PROMPTS]
    alone = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = [alone.model(text[None]).last_hidden_state[0] for text in texts]
    for start, stop in ((0, 0), *((step, step + 1) for step in range(3))):
        # prompts first, then one token of each
        ranges = [(0, n) if stop == 0 else (n + start, n + stop) for n in PROMPTS]
        for layer in layers.values():
            layer.lengths = [b - a for a, b in ranges]
        row = torch.cat([text[a:b] for text, (a, b) in zip(texts, ranges, strict=True)])
        positions = torch.cat([torch.arange(a, b) for a, b in ranges])
        said = {"use_cache": False, "attention_instances": layers, "return_dict": False}
        hidden = model(input_ids=row[None], inputs_embeds=None, position_ids=positions[None], **said)[0][0]
        want = torch.cat([states[a:b] for states, (a, b) in zip(expected, ranges, strict=True)])
        torch.testing.assert_close(hidden, want, **FLOAT32)
        embedded = model.get_input_embeddings()(row)
        assert embedded.shape == (len(row), model.config.hidden_size)


def test_the_folder_says_what_the_backend_asks_for(tmp_path: Path) -> None:
    hosted("hmoe").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    source = (tmp_path / "modeling_moestro.py").read_text()
    assert "_supports_attention_backend = True" in source and "ALL_ATTENTION_FUNCTIONS[" in source

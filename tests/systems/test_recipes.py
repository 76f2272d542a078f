"""The recipes of both papers: tiny models against the references, paper sizes counted on the meta device."""

from pathlib import Path

import pytest
import torch

from moestro.experts import FFNBank
from moestro.model import Transformer
from moestro.recipe.build import build_model
from moestro.recipe.load import load_recipe
from moestro.routing import SparseRouting, Trace
from tests.reference import hmoe, peer, transformer
from tests.systems.decoders import Twin
from tests.tolerances import FLOAT64

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
VOCAB = 32_000
close = torch.testing.assert_close


def paper_model(name: str) -> Transformer:
    return build_model(load_recipe(RECIPES / "paper" / name), VOCAB, device="meta")


def parameters(model: Transformer) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def evenly_routed(model: Transformer, k: int) -> list[Trace]:
    """Traces as if every layer had given each of 8 experts the same number of tokens."""
    expert = torch.tensor([[(i + j) % 8 for j in range(k)] for i in range(8)])
    routing = SparseRouting.from_topk(expert, torch.full((8, k), 1 / k), 8)
    return [Trace(layer, torch.zeros(8, model.d_model), routing) for layer in model.moe_layers().values()]


@pytest.mark.parametrize("name", ["dense", "moe", "hmoe", "peer"])
def test_tiny_recipe_equals_reference(name: str) -> None:
    """The model of the recipe itself, in float64: logits, loss and the gradient of every parameter."""
    model = build_model(load_recipe(RECIPES / f"{name}.yaml"), vocab_size=20).double()
    twin, sequence, targets = Twin(model), [3, 19, 4, 4], [19, 4, -100, 0]
    logits = model(torch.tensor([sequence])).logits[0]
    expected = twin.forward(sequence)
    close(logits, expected, **FLOAT64)
    torch.nn.functional.cross_entropy(logits, torch.tensor(targets)).backward()
    transformer.cross_entropy(expected, targets).backward()
    for key, parameter in model.named_parameters():
        close(parameter.grad, twin.leaves[key].grad, **FLOAT64, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize(
    ("name", "d_model", "width", "millions"),
    [("dense-0.4b.yaml", 768, 12_288, 417.2), ("dense-1b.yaml", 1024, 32_768, 1323.9)],
)
def test_dense_twins_of_hmoe(name: str, d_model: int, width: int, millions: float) -> None:
    """The paper's 417M and 1.32B, with all norms."""
    total = parameters(paper_model(name))
    assert total == hmoe.model_parameters(VOCAB, d_model, 12, d_model, 3 * d_model * width)
    assert round(total / 1e6, 1) == millions


@pytest.mark.parametrize("name", ["hmoe-0.4b.yaml", "moe-0.4b.yaml"])
def test_mixtures_of_the_0_4b_model(name: str) -> None:
    """Same total as the dense twin but for routers; 162.5M active when evenly routed (the paper's 163M)."""
    model = paper_model(name)
    assert parameters(model) == parameters(paper_model("dense-0.4b.yaml")) + 12 * 8 * 768
    active = model.active_parameters(evenly_routed(model, 2))
    assert active == hmoe.model_parameters(VOCAB, 768, 12, 768, 3 * 768 * 3072 + 8 * 768)
    assert round(active / 1e6, 1) == 162.5
    widths = hmoe.widths_from_ratios(hmoe.ARITHMETIC if name.startswith("hmoe") else (1,) * 8, 12_288)
    for layer in model.moe_layers().values():
        assert isinstance(layer.bank, FFNBank) and list(layer.bank.widths) == widths


def test_the_penalty_saves_what_its_fixed_point_says() -> None:
    """Loads in proportion to 1/h: 0.912 of the homogeneous expert width, so 155M active (the paper reports 153M)."""
    model = paper_model("hmoe-0.4b.yaml")
    widths = hmoe.widths_from_ratios(hmoe.ARITHMETIC, 12_288)
    loads = torch.tensor([1e6 / width for width in widths]).round().long()
    expert = torch.repeat_interleave(torch.arange(8), loads)
    n_tokens = len(expert) // 2
    routing = SparseRouting(torch.arange(len(expert)) % n_tokens, expert, torch.ones(len(expert)), n_tokens, 8)
    traces = [Trace(layer, torch.zeros(n_tokens, 1), routing) for layer in model.moe_layers().values()]
    assert abs(float(traces[0].active_width().mean()) / 3072 - 0.912) < 1e-3
    assert round(model.active_parameters(traces) / 1e6) == 155


def test_the_3b_model_as_interpreted() -> None:
    """2.58B with 0.77B active, tied embeddings and attention narrower than the model."""
    model = paper_model("hmoe-3b-interpreted.yaml")
    assert round(parameters(model) / 1e9, 2) == 2.58
    assert round(model.active_parameters(evenly_routed(model, 2)) / 1e9, 2) == 0.77


def test_a_million_experts() -> None:
    """1024^2 experts in the sixth of twelve blocks: 1.61B parameters there, 7.7 million FLOPs a token."""
    model = paper_model("peer-1m.yaml")
    ((name, layer),) = model.moe_layers().items()
    assert name == "blocks.5.ffn"
    stored = sum(parameter.numel() for parameter in layer.parameters())
    assert stored == peer.parameters(1024**2, 768, heads=8, d_key=256)
    assert layer.expected_token_flops() == sum(peer.flops(1024**2, 768, heads=8, top_k=16, d_key=256).values())
    dense = 2 * 768 * 3072
    assert parameters(model) == hmoe.model_parameters(VOCAB, 768, 12, 768, dense) - dense + stored

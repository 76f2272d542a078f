"""The recipes of both papers: tiny models against the references, paper sizes counted on the meta device."""

from pathlib import Path

import pytest
import torch

from moestro.experts import FFNBank
from moestro.model import Transformer
from moestro.objectives import LoadBalance, ParameterPenalty, RouterEntropy
from moestro.recipe.build import build_model, build_training
from moestro.recipe.load import load_recipe
from moestro.routers import ProductKeyRouter, ScoredRouter, Select, TopK, TopP
from moestro.routers.query_norm import BatchQueryNorm
from moestro.routing import SparseRouting, Trace
from moestro.train.step import WeightedObjectives
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


def scored(model: Transformer) -> list[tuple[Select, tuple[int, ...]]]:
    """Selection and widths of every block."""
    found = []
    for layer in model.moe_layers().values():
        assert isinstance(layer.router, ScoredRouter) and isinstance(layer.bank, FFNBank)
        found.append((layer.router.select, layer.bank.widths))
    return found


@pytest.mark.parametrize(
    ("name", "widths", "objectives"),
    [
        ("moe", (64,) * 8, [("load_balance", 0.01, LoadBalance())]),
        ("hmoe", tuple(range(36, 93, 8)), [("parameter_penalty", 0.01, ParameterPenalty("mean"))]),
        ("paper/moe-0.4b", (1536,) * 8, [("load_balance", 0.01, LoadBalance())]),
        ("paper/hmoe-0.4b", tuple(range(864, 2209, 192)), [("parameter_penalty", 0.01, ParameterPenalty("mean"))]),
    ],
)
def test_mixtures_are_top_2_of_8_in_every_block(
    name: str, widths: tuple[int, ...], objectives: WeightedObjectives
) -> None:
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    model = build_model(recipe, VOCAB, device="meta")
    assert len(scored(model)) == len(model.blocks)
    for select, found in scored(model):
        assert isinstance(select, TopK) and select.top_k == 2 and select.renormalize and found == widths
    assert build_training(recipe)[1] == objectives


def test_top_p_has_the_entropy_loss_of_the_right_sign() -> None:
    recipe = load_recipe(RECIPES / "paper" / "hmoe-0.4b-top-p.yaml")
    for select, widths in scored(build_model(recipe, VOCAB, device="meta")):
        assert isinstance(select, TopP) and select.threshold == 0.6 and widths == tuple(range(864, 2209, 192))
    (penalty, entropy) = build_training(recipe)[1]
    assert penalty == ("parameter_penalty", 0.01, ParameterPenalty("mean"))
    assert entropy == ("router_entropy", 1e-4, RouterEntropy(scale_by_n=False, literal=False))


@pytest.mark.parametrize(
    ("name", "block", "heads", "top_k", "n_experts"), [("peer", 2, 4, 8, 4096), ("paper/peer-1m", 5, 8, 16, 1024**2)]
)
def test_peer_replaces_the_middle_block(name: str, block: int, heads: int, top_k: int, n_experts: int) -> None:
    """Keys shared by the heads, batch-normalised queries, softmax gates."""
    model = build_model(load_recipe(RECIPES / f"{name}.yaml"), VOCAB, device="meta")
    assert list(model.moe_layers()) == [f"blocks.{block}.ffn"]
    router = model.moe_layers()[f"blocks.{block}.ffn"].router
    assert isinstance(router, ProductKeyRouter) and isinstance(router.query_norm, BatchQueryNorm)
    assert (router.heads, router.top_k, router.n_experts, router.gate) == (heads, top_k, n_experts, "softmax")
    assert router.keys.shape[1] == 1


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
    active = float(model.active_parameters(evenly_routed(model, 2)))
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
    assert round(float(model.active_parameters(traces)) / 1e6) == 155


def test_the_3b_model_as_interpreted() -> None:
    """2.58B with 0.77B active, tied embeddings and attention narrower than the model."""
    model = paper_model("hmoe-3b-interpreted.yaml")
    assert round(parameters(model) / 1e9, 2) == 2.58
    assert round(float(model.active_parameters(evenly_routed(model, 2))) / 1e9, 2) == 0.77


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

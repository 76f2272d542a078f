"""FLOPs of training where weights are frozen: against torch's own counter, which sees what autograd computes."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moestro.cost import Cost, of_products
from moestro.experts import FFNBank
from moestro.layers import DenseFFN, LowRankMixtures, MoELayer, adapt
from moestro.model import Transformer
from moestro.routers import LinearScore, ScoredRouter, TopK
from tests.train.tiny import tiny_model

D, W, T = 12, 20, 7


def counted(layer: torch.nn.Module) -> int:
    """FLOPs of products in a forward and a backward pass whose input needs a gradient."""
    x = torch.randn(T, D, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        layer(x)[0].square().sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("freeze", [False, True])
def test_a_dense_layer_and_its_adapters(freeze: bool) -> None:
    layer = DenseFFN(D, W)
    assert layer.untraced_flops(T).training().useful == counted(layer) == 3 * layer.untraced_flops(T).useful
    adapters = adapt(layer, "w_in", LowRankMixtures(1, 2), freeze=freeze)
    # gates and their sums are element by element: torch's counter has products alone
    (mixture,) = adapters.layers["expert.w_in"].each()
    rank = of_products(T, *(m[0] for m in (mixture.bank.down, mixture.bank.up)), mixture.router.score.weight)
    assert counted(layer) == (layer.untraced_flops(T) + rank).training().useful
    assert layer.untraced_flops(T).spared == (layer.untraced_flops(T).useful if freeze else 0)


@pytest.mark.parametrize("frozen", ["", "router", "branches", "all"])
def test_a_mixture_of_which_parts_are_frozen(frozen: str) -> None:
    layer = MoELayer(ScoredRouter(LinearScore(D, 4), TopK(4)), [FFNBank(D, [W] * 4)])
    for name in ("router", "branches") if frozen == "all" else [frozen] if frozen else []:
        getattr(layer, name).requires_grad_(False)
    _, (trace,) = layer(torch.randn(T, D))
    cost = trace.flops()
    router, experts = 2 * T * D * 4, 2 * T * 4 * 3 * D * W
    spared = {"": 0, "router": router, "branches": experts, "all": router + experts}[frozen]
    assert float(cost.useful) == router + experts and float(cost.spared) == spared
    assert float(cost.training().useful) == 3 * (router + experts) - spared


def test_costs_add_up_and_teachers_go_forward_only() -> None:
    frozen, learning = torch.zeros(3, 4), torch.zeros(3, 4, requires_grad=True)
    cost = of_products(5, frozen, learning)
    assert cost == Cost(240.0, 240.0, 120.0) and cost.training() == Cost(600.0, 600.0)
    assert (cost * 2 + cost).item() == Cost(720.0, 720.0, 360.0)
    assert cost.forward_only().training().useful == cost.useful


def test_a_frozen_decoder_costs_two_thirds_and_its_adapters_all() -> None:
    def training(model: Transformer) -> float:
        output = model(torch.zeros(2, 6, dtype=torch.int64))
        return float(model.flops(2, 6, output.traces).training().useful)

    plain, frozen, free = (tiny_model(kinds=("dense", "moe")) for _ in range(3))
    adapt(frozen, "query|value", LowRankMixtures(2, 2))
    adapt(free, "query|value", LowRankMixtures(2, 2), freeze=False)
    weights = 2 * 12 * sum(m.weight.numel() for m in plain.modules() if isinstance(m, torch.nn.Linear))
    experts = float(plain(torch.zeros(2, 6, dtype=torch.int64)).traces[0].flops().useful)
    assert training(free) - training(frozen) == pytest.approx(weights + experts)
    assert training(free) > training(plain)

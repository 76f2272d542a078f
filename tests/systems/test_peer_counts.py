"""PEER's parameters, FLOPs and scale at initialisation (checks 11 and 12 of the list in test_peer.py)."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moestro.experts import GLUSingletonBank, SingletonBank, ValueBank
from moestro.layers import MoELayer
from moestro.ops import backend
from moestro.routers import ProductKeyRouter
from tests.reference import peer
from tests.systems.peer_layers import D, Norm, make_layer, random

SIZES = [(16, 5, 2, 3, 6), (64, 12, 3, 4, 8), (1024**2, 768, 8, 16, 256)]


def build(n_experts: int, d_model: int, heads: int, top_k: int, d_key: int, **more) -> MoELayer:
    router = ProductKeyRouter(d_model, n_experts, heads, top_k, d_key, **more)
    return MoELayer(router, [SingletonBank(d_model, n_experts, heads=heads, top_k=top_k)])


@pytest.mark.parametrize("shared_keys", [True, False])
@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize(("n_experts", "d_model", "heads", "top_k", "d_key"), SIZES)
def test_parameters(
    n_experts: int, d_model: int, heads: int, top_k: int, d_key: int, norm: Norm, shared_keys: bool
) -> None:
    """2 N d + h d dk + 2 n (dk/2) (1 or h), and the norm; the paper's own size on the meta device."""
    with torch.device("meta"):
        layer = build(n_experts, d_model, heads, top_k, d_key, shared_keys=shared_keys, query_norm=norm)
    expected = peer.parameters(n_experts, d_model, heads, d_key, shared_keys=shared_keys, affine_norm=norm == "batch")
    assert sum(parameter.numel() for parameter in layer.parameters()) == expected


def test_the_papers_size_in_numbers() -> None:
    """d = 768: 1.61 B parameters, of which a token computes with little; routing is 95 % of the layer's compute."""
    with torch.device("meta"):
        layer = build(1024**2, 768, 8, 16, 256)
    assert sum(parameter.numel() for parameter in layer.bank.parameters()) == 2 * 1024**2 * 768
    total, routing = layer.expected_token_flops(), layer.router.flops(1)
    assert total == 3_145_728 + 4_194_304 + 393_216
    assert round(routing / total, 2) == 0.95


@pytest.mark.parametrize("how", ["fused", "reference"])
@pytest.mark.parametrize("shared_keys", [True, False])
def test_analytic_flops_equal_a_counter(shared_keys: bool, how: str) -> None:
    """What `flops` says of a routing, and before any; the counter sees every matrix product that ran."""
    layer = make_layer(side=4, heads=2, k=3, d_key=6, shared_keys=shared_keys)
    x = random(11, D)
    with backend.force(how), FlopCounterMode(display=False) as counter:
        _, (trace,) = layer(x)
    expected = peer.flops(16, D, heads=2, top_k=3, d_key=6)
    assert layer.flops(trace.routing).useful == 11 * sum(expected.values())
    assert layer.expected_token_flops() == sum(expected.values())
    # the weighted sum of the fused path is an embedding bag, which the counter does not know
    bag = 11 * expected["experts"] // 2 if how == "fused" else 0
    assert counter.get_total_flops() + bag == 11 * sum(expected.values())


@pytest.mark.parametrize("norm", ["batch", "layer", "rms", "qk_rms", "none"])
@pytest.mark.parametrize(("d_model", "heads", "top_k", "d_key"), [(128, 4, 16, 32), (256, 8, 8, 64), (128, 1, 32, 64)])
def test_output_starts_at_the_scale_asked_for(d_model: int, heads: int, top_k: int, d_key: int, norm: Norm) -> None:
    """Check 12: for tokens of unit variance, within 10 % of `output_std`, by default that of our dense FFN."""
    for target in (0.6, 0.1):
        router = ProductKeyRouter(d_model, 64 * 64, heads, top_k, d_key, query_norm=norm)
        bank = SingletonBank(d_model, 64 * 64, heads=heads, top_k=top_k, output_std=target)
        with torch.no_grad():
            y, _ = MoELayer(router, [bank])(torch.randn(1000, d_model))
        assert abs(float(y.std()) / target - 1) < 0.1


def test_output_scale_follows_the_activation() -> None:
    for activation in ("relu", "silu", "none"):
        router = ProductKeyRouter(128, 64 * 64, heads=4, top_k=16, d_key=32)
        bank = SingletonBank(128, 64 * 64, activation, heads=4, top_k=16)
        with torch.no_grad():
            y, _ = MoELayer(router, [bank])(torch.randn(1000, 128))
        assert abs(float(y.std()) / 0.6 - 1) < 0.1


def test_output_scale_follows_the_gate() -> None:
    """Sigmoid gates of the best of many are near 1, not 1 / top_k: without `gate` the output would start 15 times
    too large at these sizes."""
    for gate in ("softmax", "sigmoid", "relu"):
        router = ProductKeyRouter(128, 64 * 64, heads=8, top_k=16, d_key=32, gate=gate)
        for make in (SingletonBank, GLUSingletonBank, ValueBank):
            bank = make(128, 64 * 64, heads=8, top_k=16, gate=gate)
            with torch.no_grad():
                y, _ = MoELayer(router, [bank])(torch.randn(1000, 128))
            assert abs(float(y.std()) / 0.6 - 1) < (0.1 if gate == "softmax" else 0.25), (gate, make)

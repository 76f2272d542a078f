"""Gradients of each expert in float32 under every backend, against the definition in float64."""

import copy

import pytest
import torch

from moestro import FFNBank, LinearScore, MoELayer, ScoredRouter, SingletonBank, TopK
from moestro.experts import ExpertBank, GLUSingletonBank, RaggedBank, StackedBank, ValueBank
from moestro.ops import backend, native
from tests.ops.triton_cases import DEVICE, why_not
from tests.tolerances import FLOAT32_NORM

D, TOKENS = 20, 37
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "none")
BANKS = {
    "unequal": lambda activation: FFNBank(D, [7, 5, 1, 24], activation=activation),
    "unequal, one matrix in": lambda activation: FFNBank(D, [7, 5, 1, 24], activation=activation, glu=False),
    "stacked": lambda activation: StackedBank(D, 4, 9, activation),
    "singleton": lambda activation: SingletonBank(D, 4, activation=activation),
    "gated singleton": lambda activation: GLUSingletonBank(D, 4, activation=activation),
    "small, of unequal sizes": lambda activation: RaggedBank(D, [4, 2, 1, 1], activation=activation),
    "values": lambda activation: ValueBank(D, 4),
}
BACKENDS = [
    "reference",
    "fused",
    pytest.param("native", marks=pytest.mark.skipif(not native.available(), reason=f"kernels {native.status()}")),
    # in the interpreter, on CPUs, which takes seconds a case
    pytest.param("triton", marks=[pytest.mark.slow, pytest.mark.skipif(bool(why_not()), reason=why_not())]),
]


def gradients(layer: MoELayer, x: torch.Tensor, name: str) -> dict[str, torch.Tensor]:
    """By expert and parameter; those of the router and the input, too."""
    x = x.detach().requires_grad_()
    with backend.force(name):
        y, _ = layer(x)
        (y * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype, device=y.device).view_as(y)).sum().backward()
    found = {"input": x.grad, "router": layer.router.score.weight.grad, "output": y.detach()}
    bank: ExpertBank = layer.bank
    for expert in range(bank.n_experts):
        for number, (parameter, rows) in enumerate(bank.weights_of(expert)):
            found[f"expert {expert}, parameter {number}"] = parameter.grad[rows]
    return found


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", BANKS)
def test_gradients_of_each_expert_are_those_of_float64(kind, activation, name):
    device = DEVICE if name == "triton" else "cpu"
    torch.manual_seed(0)
    layer = MoELayer(ScoredRouter(LinearScore(D, 4, init_std=0.3), TopK(2)), [BANKS[kind](activation)])
    with torch.no_grad():
        for parameter in layer.bank.parameters():
            parameter.copy_(torch.randn_like(parameter) * D**-0.5)
    x = torch.randn(TOKENS, D)
    exact = gradients(copy.deepcopy(layer).double(), x.double(), "reference")
    found = gradients(layer.to(device), x.to(device), name)
    assert found.keys() == exact.keys() and len(found) >= 3 + 4
    for what, wanted in exact.items():
        # gradients of a narrow expert are compared with their own size, not with that of all
        error = (found[what].cpu().double() - wanted).norm() / wanted.norm().clamp(min=1e-30)
        assert error < FLOAT32_NORM, f"{what}: off by {error:.1e}"


@pytest.mark.parametrize("name", BACKENDS)
def test_all_tokens_to_one_expert_and_experts_that_are_never_used(name):
    """Idle experts have gradients of exactly 0, the crowded one those of float64."""
    layer = MoELayer(ScoredRouter(LinearScore(D, 4), TopK(1)), [BANKS["unequal"]("silu")])
    with torch.no_grad():
        layer.router.score.weight.zero_()
        layer.router.score.weight[3] = 1.0
    device = DEVICE if name == "triton" else "cpu"
    x = torch.rand(TOKENS, D)
    exact = gradients(copy.deepcopy(layer).double(), x.double(), "reference")
    found = gradients(layer.to(device), x.to(device), name)
    for what, wanted in exact.items():
        if what.startswith("expert") and not what.startswith("expert 3"):
            assert not found[what].any(), what
        elif what.startswith("expert"):
            assert (found[what].cpu().double() - wanted).norm() < FLOAT32_NORM * wanted.norm(), what


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BACKENDS)
def test_a_layer_without_tokens_has_gradients_of_zero(name, dtype):
    device = DEVICE if name == "triton" else "cpu"
    if (name, device, dtype) == ("triton", "cpu", torch.bfloat16):
        pytest.skip("Triton's interpreter computes bfloat16 wrongly")
    layer = MoELayer(ScoredRouter(LinearScore(D, 4), TopK(2)), [BANKS["unequal"]("silu")])
    with backend.force(name):
        y, _ = layer.to(device, dtype)(torch.zeros(0, D, device=device, dtype=dtype))
        y.sum().backward()
    assert y.shape == (0, D)
    assert all(p.grad is None or not p.grad.any() for p in layer.parameters())


def test_bfloat16_does_not_lose_small_gradients():
    """A loss a quintillion times smaller gives gradients a quintillion times smaller, none of them 0: bfloat16 has the
    exponents of float32."""
    layer = MoELayer(ScoredRouter(LinearScore(D, 4), TopK(2)), [BANKS["unequal"]("silu")])
    x = torch.randn(TOKENS, D)
    norms = []
    for scale in (1.0, 1e-18):
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y, _ = layer(x)
        (y.float().square().sum() * scale).backward()
        norms.append({name: parameter.grad.double().norm() / scale for name, parameter in layer.named_parameters()})
    for name, norm in norms[0].items():
        assert norm > 0 and abs(norms[1][name] / norm - 1) < 0.02, name

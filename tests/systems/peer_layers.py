"""PEER layers for the tests of this folder, and what the reference makes of the same weights."""

from typing import Literal

import torch
from torch import Tensor, nn

from moestro.experts import SingletonBank
from moestro.layers import MoELayer
from moestro.routers import ProductKeyRouter
from moestro.routers.query_norm import BatchQueryNorm, QKRMSNorm
from tests.reference import peer

D = 5
Norm = Literal["batch", "layer", "rms", "qk_rms", "none"]
Gate = Literal["softmax", "sigmoid", "relu"]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def make_layer(
    side: int = 4,
    heads: int = 2,
    k: int = 3,
    d_key: int = 6,
    shared_keys: bool = True,
    norm: Norm = "batch",
    gate: Gate = "softmax",
    activation: str = "gelu",
) -> MoELayer:
    """A small layer in float64 whose normalisation is not the identity it starts as."""
    router = ProductKeyRouter(D, side * side, heads, k, d_key, shared_keys, norm, gate)
    layer = MoELayer(router, [SingletonBank(D, side * side, activation)]).double()
    with torch.no_grad():
        for parameter in router.query_norm.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def router_of(layer: MoELayer) -> ProductKeyRouter:
    assert isinstance(layer.router, ProductKeyRouter)
    return layer.router


def bank_of(layer: MoELayer) -> SingletonBank:
    assert isinstance(layer.bank, SingletonBank)
    return layer.bank


def batch_norm(layer: MoELayer) -> BatchQueryNorm:
    norm = router_of(layer).query_norm
    assert isinstance(norm, BatchQueryNorm)
    return norm


def grad(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


class Twin:
    """Copies of a layer's weights as leaves, one for every expert's u and v, run through the reference."""

    def __init__(self, layer: MoELayer) -> None:
        router, bank = router_of(layer), bank_of(layer)
        self.router = router
        self.weights = {name: copy(parameter) for name, parameter in router.named_parameters()}
        self.up, self.down = [copy(row) for row in bank.up], [copy(row) for row in bank.down]
        self.activation = bank.activation

    def queries(self, x: Tensor) -> Tensor:
        q = peer.queries(x, self.weights["query"])
        norm = self.router.query_norm
        if isinstance(norm, QKRMSNorm):
            return peer.unit_queries(q, norm.d_half, self.weights["query_norm.weight"])
        if not isinstance(norm, BatchQueryNorm):
            return token_norm(q, {name: w for name, w in self.weights.items() if "norm" in name})
        moments = peer.batch_moments(q) if norm.training else (norm.mean, norm.variance)
        scale, shift = self.weights["query_norm.weight"], self.weights["query_norm.bias"]
        return peer.normalized(q, *moments, scale, shift, norm.eps)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, list[list[list[int]]]]:
        first, second = self.weights["keys"]
        if isinstance(self.router.query_norm, QKRMSNorm):
            first, second = peer.unit_keys(first), peer.unit_keys(second)
        if len(first) == 1:
            first, second = first[0], second[0]
        router = self.router
        return peer.layer(
            x, self.queries(x), first, second, self.up, self.down,
            heads=router.heads, k=router.top_k, kind=router.gate, sigma=self.activation,
        )  # fmt: skip


def copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def token_norm(q: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """The norms that PEER does not use, by their textbook formulas; told apart by their weights."""
    values = list(weights.values())
    if not values:
        return q
    if len(values) == 1:
        return q / (q.square().mean(-1, keepdim=True) + 1e-6).sqrt() * values[0]
    centred = q - q.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * values[0] + values[1]


def set_running_statistics(layer: nn.Module) -> None:
    """Running statistics as after some training, so that the layer may be evaluated."""
    for module in layer.modules():
        if isinstance(module, BatchQueryNorm):
            module.update(0.3 * random(module.features), 0.5 + torch.rand(module.features).double(), 0.1)

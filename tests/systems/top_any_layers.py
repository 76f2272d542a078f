"""Layers with top-any routing in float64, their experts as functions, and the reference on copies of their weights."""

import torch
from torch import Tensor

from moestro.experts import FFNBank
from moestro.layers import MoELayer
from moestro.routers import CosineScore, ScoredRouter, TopAny
from tests.reference import dynmoe, hmoe
from tests.systems.hmoe_layers import triples

D = 6
WIDTHS = [3, 1, 4, 2, 5]
MASK = [True, True, False, True, True]


def top_any_layer(mask: list[bool] | None = None, orthogonal: bool = True, **options) -> MoELayer:
    score = CosineScore(D, len(WIDTHS), temperature=1.0, orthogonal=orthogonal, init_std=0.5)
    layer = MoELayer(ScoredRouter(score, TopAny(len(WIDTHS), **options)), [FFNBank(D, WIDTHS)]).double()
    if mask is not None:
        router_of(layer).set_available(torch.tensor(mask))
    return layer


def router_of(layer: MoELayer) -> ScoredRouter:
    assert isinstance(layer.router, ScoredRouter)
    return layer.router


def select_of(layer: MoELayer) -> TopAny:
    select = router_of(layer).select
    assert isinstance(select, TopAny)
    return select


def set_thresholds(layer: MoELayer, values: float | list[float]) -> None:
    with torch.no_grad():
        select_of(layer).thresholds.copy_(torch.as_tensor(values, dtype=torch.float64).expand(len(WIDTHS)))


class Twin:
    """Leaves with the weights of a layer, and the reference on them."""

    def __init__(self, layer: MoELayer) -> None:
        self.leaves = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
        self.a = select_of(layer).log_sharpness.detach().exp()
        if "router.select.log_sharpness" in self.leaves:
            self.a = self.leaves["router.select.log_sharpness"].clamp(max=torch.tensor(100.0).log()).exp()
        self.mask: list[bool] = router_of(layer).available.tolist()
        self.training, self.normalized = layer.training, select_of(layer).gradient == "normalized"

    @property
    def W(self) -> Tensor:
        return self.leaves["router.score.weight"]

    @property
    def G(self) -> Tensor:
        return self.leaves["router.select.thresholds"]

    def __call__(self, x: Tensor) -> tuple[Tensor, list[dict[int, Tensor]]]:
        w_in, w_out = (self.leaves[f"branches.0.{name}.weight"] for name in ("w_in", "w_out"))
        experts = [lambda x_t, e=e: hmoe.swiglu_expert(x_t, e) for e in triples(w_in, w_out, WIDTHS)]
        options = {"training": self.training, "normalized": self.normalized}
        return dynmoe.layer(x, self.W, self.G, experts, self.mask, self.a, **options)

"""Small layers for tests of compression, and their matrices for references."""

import torch

from moestro.experts import FFNBank
from moestro.layers import MoELayer
from moestro.routers import LinearScore, ScoredRouter, TopK


def small_layer(n_experts=6, width=5, d_model=8, k=2, seed=0, renormalize=True) -> MoELayer:
    """A mixture in float64 whose router has large enough logits to prefer some experts."""
    torch.manual_seed(seed)
    router = ScoredRouter(LinearScore(d_model, n_experts), TopK(k, renormalize))
    layer = MoELayer(router, [FFNBank(d_model, [width] * n_experts)]).double().eval()
    with torch.no_grad():
        router.score.weight.normal_()
    return layer


def matrices(layer: MoELayer):
    """(gate, up, down) of every expert."""
    pairs = zip(layer.bank.w_in.matrices(), layer.bank.w_out.matrices(), strict=True)
    return [(*w_in.detach().chunk(2), w_out.detach()) for w_in, w_out in pairs]


def tokens(n=40, d_model=8, seed=1):
    return torch.randn(n, d_model, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

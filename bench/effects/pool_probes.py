"""Probes of a pool of experts: who is in it, how alike its router rows are, and whom training would leave unserved."""

from typing import Any

import torch
import torch.nn.functional as F

from bench.effects.routing_probes import HISTORY_TOKENS
from bench.effects.study import Trained
from moestro.evaluate.scoring import score
from moestro.routers import ScoredRouter


def pool(trained: Trained) -> list[dict[str, Any]]:
    """Of every layer with a `ScoredRouter`, after training: {"available": experts in the pool, "cosine": mean absolute
    cosine of two of their router rows, "unserved": share of the held-out tokens (or parts of tokens) that it
    routes that have no expert as in training}."""
    model = trained.model()
    layers = {
        id(layer): layer.router for layer in model.moe_layers().values() if isinstance(layer.router, ScoredRouter)
    }
    unserved, routed = dict.fromkeys(layers, 0), dict.fromkeys(layers, 0)
    model.train()
    with torch.no_grad():
        for batch in trained.held_out(min(HISTORY_TOKENS, trained.final_tokens)):
            traces = score(model, batch, "fp32")[0].traces
            for layer, routing in ((id(trace.layer), trace.routing) for trace in traces if id(trace.layer) in layers):
                unserved[layer] += int((routing.per_token(1.0) == 0).sum())
                routed[layer] += routing.n_tokens
    return [
        {
            "available": int(router.available.sum()),
            "cosine": mean_cosine(router),
            "unserved": unserved[layer] / max(1, routed[layer]),
        }
        for layer, router in layers.items()
    ]


@torch.no_grad()
def mean_cosine(router: ScoredRouter) -> float:
    """Mean absolute cosine of two router rows of available experts; 0 where there is one expert."""
    unit = F.normalize(router.score.weight[router.available], dim=-1)
    n = len(unit)
    return float((unit @ unit.T).fill_diagonal_(0).abs().sum() / max(1, n * (n - 1)))

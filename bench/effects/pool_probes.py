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
    cosine of two of their router rows, "unserved": share of held-out tokens that have no expert as in training}."""
    model = trained.model()
    routers = [layer.router for layer in model.moe_layers().values() if isinstance(layer.router, ScoredRouter)]
    unserved, tokens = torch.zeros(len(routers)), 0
    model.train()
    with torch.no_grad():
        for batch in trained.held_out(min(HISTORY_TOKENS, trained.final_tokens)):
            output, _ = score(model, batch, "fp32")
            none = {id(t.layer): (t.experts_per_token() == 0).sum() for t in output.traces}
            unserved += torch.stack(
                [none[id(layer)] for layer in model.moe_layers().values() if layer.router in routers]
            )
            tokens += int(batch.keep.sum())
    return [
        {"available": int(router.available.sum()), "cosine": mean_cosine(router), "unserved": float(share)}
        for router, share in zip(routers, unserved / tokens, strict=True)
    ]


@torch.no_grad()
def mean_cosine(router: ScoredRouter) -> float:
    """Mean absolute cosine of two router rows of available experts; 0 where there is one expert."""
    unit = F.normalize(router.score.weight[router.available], dim=-1)
    n = len(unit)
    return float((unit @ unit.T).fill_diagonal_(0).abs().sum() / max(1, n * (n - 1)))

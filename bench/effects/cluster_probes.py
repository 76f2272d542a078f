"""Probe of how experts of one cluster differ from those of others."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.effects.expert_probes import outputs
from bench.effects.study import Trained
from moestro.evaluate.perplexity import evaluating
from moestro.evaluate.scoring import score
from moestro.objectives import ClusterVariance
from moestro.routing import Trace

# Tokens on which every expert is run, and held-out tokens for the rest.
COMPARED, TOKENS = 256, 16_384


def relatives(trained: Trained) -> dict[str, float] | None:
    """Of the first layer with clusters, None where there is none: the scale-free `variance` of probability inside them;
    the share of tokens whose `second_choice` is in the cluster of the first, beside `chance`, (n - 1) / (E - 1); the
    mean cosine of two experts' outputs for a token, `siblings` (one cluster) and `strangers`. In evaluation."""
    model = trained.model()
    seen: list[Trace] = []
    with evaluating(model):
        for batch in trained.held_out(min(TOKENS, trained.final_tokens)):
            traces = score(model, batch, "fp32")[0].traces
            seen += [trace for trace in traces if trace.layer.cluster is not None][:1]
        return summary(seen) if seen else None


def summary(traces: list[Trace]) -> dict[str, float]:
    """The figures of one layer's traces."""
    layer: Any = traces[0].layer
    cluster = layer.cluster
    tokens = sum(trace.routing.n_tokens for trace in traces)
    variance = sum(ClusterVariance()(trace).item() * trace.routing.n_tokens for trace in traces) / tokens
    second = sum(int(same_cluster(trace, cluster).sum()) for trace in traces) / tokens
    same = cluster[:, None] == cluster[None, :]
    off = ~torch.eye(len(cluster), dtype=torch.bool)
    alike = cosines(layer.bank, traces[0].x[:COMPARED])
    return {
        "variance": variance,
        "second_choice": second,
        "chance": float(same[off].double().mean()),
        "siblings": alike[same & off].mean().item(),
        "strangers": alike[~same].mean().item(),
    }


def same_cluster(trace: Trace, cluster: Tensor) -> Tensor:
    """Whether a token's two best experts are of one cluster."""
    logits = trace.routing.logits
    if logits is None:
        raise ValueError("a layer with clusters has no logits")
    first, second = cluster[logits.topk(2).indices].unbind(1)
    return first == second


def cosines(bank: Any, x: Tensor) -> Tensor:
    """Mean over tokens of the cosine of every two experts' outputs, [e, e]."""
    directions = F.normalize(outputs(bank, x).double(), dim=-1)
    return torch.einsum("etd,ftd->ef", directions, directions) / len(x)

"""Small models of the systems that are trained on several ranks, in one function each, and one step of training."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moestro import DenseFFN, FFNBank, LinearScore, MoELayer, ParameterPenalty, ScoredRouter, TopK
from moestro.experts import HyperExpert, HyperGenerator
from moestro.model import Attention, Block, Transformer
from moestro.objectives import FirstChoiceBalance, LoadBalance, RouterDiversity, RouterSimplicity, WeightedBalance
from moestro.parallel.layout import whole
from moestro.parallel.parallelize import parallelize
from moestro.parallel.ranks import Ranks
from moestro.parallel.settings import ParallelSettings
from moestro.routers import CosineScore, TopAny
from moestro.train.optim import clip_gradients
from moestro.train.step import backward
from tests.train.tiny import VOCABULARY, WIDTH, Counting, peer, tiny_settings

Objectives = list[tuple[str, float, Any]]


def dense() -> tuple[Transformer, Objectives]:
    return stacked([DenseFFN(WIDTH, 12), DenseFFN(WIDTH, 7)], tie_embeddings=True), []


def hmoe() -> tuple[Transformer, Objectives]:
    """Unequal widths, one of which no number of ranks divides; the penalty of the whole step."""
    layers = [MoELayer(ScoredRouter(LinearScore(WIDTH, 3), TopK(2)), [FFNBank(WIDTH, [1, 4, 6])]) for _ in range(2)]
    return stacked(layers), [("penalty", 0.3, ParameterPenalty(statistics="step"))]


def balanced() -> tuple[Transformer, Objectives]:
    """Objectives of each micro-batch, which no mean over ranks would give."""
    layers = [MoELayer(ScoredRouter(LinearScore(WIDTH, 3), TopK(2)), [FFNBank(WIDTH, [1, 4, 6])]) for _ in range(2)]
    kinds = [LoadBalance(), ParameterPenalty(), WeightedBalance(), FirstChoiceBalance()]
    return stacked(layers), [(type(kind).__name__, 0.3, kind) for kind in kinds]


def peers() -> tuple[Transformer, Objectives]:
    return stacked([peer(), DenseFFN(WIDTH, 12)]), []


def dynmoe() -> tuple[Transformer, Objectives]:
    """Objectives that read weights of routers, and a scalar parameter."""
    layers = [MoELayer(ScoredRouter(CosineScore(WIDTH, 4), TopAny(4)), [FFNBank(WIDTH, [4] * 4)]) for _ in range(2)]
    return stacked(layers), [("diversity", 0.2, RouterDiversity()), ("simplicity", 0.1, RouterSimplicity())]


def hypermoe() -> tuple[Transformer, Objectives]:
    """One generator in both layers: blocks with parameters in common."""
    generator = HyperGenerator(WIDTH, rank=3, selection=4, layer=3, hidden=5)
    layers = []
    for _ in range(2):
        router = ScoredRouter(LinearScore(WIDTH, 3), TopK(1, renormalize=False))
        hyper = HyperExpert(WIDTH, 3, generator, embedding=4, hidden=5, init_std=0.7)
        layers.append(MoELayer(router, [FFNBank(WIDTH, [4] * 3), hyper]))
    return stacked(layers), []


SYSTEMS: dict[str, Callable[[], tuple[Transformer, Objectives]]] = {
    "dense": dense,
    "hmoe": hmoe,
    "balanced": balanced,
    "peer": peers,
    "dynmoe": dynmoe,
}
# adapters are generated for each micro-batch, and so on each rank: compared with as many micro-batches
PER_MICRO_BATCH = {"hypermoe": hypermoe}


def stacked(layers: list[Any], tie_embeddings: bool = False) -> Transformer:
    blocks = [Block(WIDTH, Attention(WIDTH, n_heads=2), layer) for layer in layers]
    return Transformer(VOCABULARY, WIDTH, blocks, tie_embeddings=tie_embeddings)


def one_step(
    system: str,
    ranks: Ranks,
    settings: ParallelSettings,
    accumulate: int = 1,
    recompute: bool = False,
    precision: str = "fp32",
) -> dict[str, Tensor]:
    """Sums, norm and every gradient, whole, of a step on 8 sequences, once clipped; `kinds` counts DTensors."""
    torch.manual_seed(0)
    model, objectives = (SYSTEMS | PER_MICRO_BATCH)[system]()
    model.recompute = recompute
    plan = tiny_settings(batch_size=8, accumulate=accumulate, precision=precision)
    parallelize(model, ranks, settings, precision)
    sums = backward(model, Counting().train_batch(0, 8, 0), plan, objectives, [], ranks)
    norm = clip_gradients(model, 0.5, ranks)
    gradients = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    figures = {f"sum of {name}": ranks.summed(value) for name, value in sums.items()}
    return {**gradients, **figures, "norm": norm}

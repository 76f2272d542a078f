"""`ExpertDropout`: some experts of every cluster rest for a while."""

import numpy as np
import torch
from torch import Tensor, nn

from moestro.layers import MoELayer
from moestro.routers import ScoredRouter
from moestro.train.optim import Optimizers
from moestro.train.rules import Rule


class ExpertDropout(Rule):
    """In every cluster of n experts round(rate * n), but never all, rest for `interval` optimizer steps, then others
    do (Xie 2022, MoEC, arXiv:2207.09094, whose released code has rate 0.5 and interval 250).

    Who rests is a pure function of (seed, layer, steps // interval): the same on every rank, and after an interruption.
    Nobody rests in evaluation; resting experts get no token and no gradient. Steps are optimizer steps, not forward
    passes as in the code, so accumulation and recomputation change nothing. Layers without clusters are left alone.
    """

    def __init__(self, rate: float = 0.5, interval: int = 250, seed: int = 0) -> None:
        if not 0 <= rate < 1:
            raise ValueError(f"expert dropout rate={rate}, allowed: at least 0, below 1")
        if interval < 1:
            raise ValueError(f"expert dropout interval={interval}, allowed: at least 1")
        if seed < 0:
            raise ValueError(f"expert dropout seed={seed}, allowed: at least 0")
        self.rate, self.interval, self.seed = rate, interval, seed
        self.layers: list[tuple[ScoredRouter, Tensor]] = []

    def start(self, model: nn.Module, optimizer: Optimizers) -> None:
        """Raises: ValueError where the model has no layer with clusters and a `ScoredRouter`."""
        self.layers = []
        for layer in model.modules():
            if isinstance(layer, MoELayer) and layer.cluster is not None and isinstance(layer.router, ScoredRouter):
                self.layers.append((layer.router, layer.cluster))
        if not self.layers:
            raise ValueError(
                "expert dropout found no clusters; allowed: ffn: {kind: moe, clusters: 8, router: {kind: scored, ...}}"
            )
        self._draw(0)

    def apply(self, step: int) -> None:
        if step % self.interval == 0:
            self._draw(step // self.interval)

    def skip(self, step: int) -> None:
        """Who rests follows the number of the step, not what it showed."""
        self.apply(step)

    def _draw(self, block: int) -> None:
        for number, (router, cluster) in enumerate(self.layers):
            router.set_resting(resting(cluster.cpu(), self.rate, self.seed, number, block).to(cluster.device))


def resting(cluster: Tensor, rate: float, seed: int, layer: int, block: int) -> Tensor:
    """Which experts rest (bool [e]), given the cluster of each: the round(rate * n), at most n - 1, of every cluster
    with the smallest numbers of Philox(seed, layer and block)."""
    # raw numbers, which numpy promises to be the same in every version
    counter = np.array([0, 0, layer, block], np.uint64)
    random = np.random.Philox(key=np.array([seed, 0], np.uint64), counter=counter).random_raw(len(cluster))
    found = torch.zeros(len(cluster), dtype=torch.bool)
    for members in (np.flatnonzero(cluster.numpy() == c) for c in np.unique(cluster.numpy())):
        off = min(round(rate * len(members)), len(members) - 1)
        found[members[np.argsort(random[members], kind="stable")[:off]]] = True
    return found

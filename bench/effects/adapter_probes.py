"""What gates of adapters have learned of the kinds of text: how far apart they are between two of them."""

from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from bench.effects.study import Trained
from moestro.evaluate.perplexity import evaluating
from moestro.evaluate.scoring import score
from moestro.layers import adapters_of
from moestro.layers.adapted import Mixture
from moestro.model import Transformer

# Held-out text that is read, which has both groups even where the final figures are of less.
TOKENS = 131_072


def gates(trained: Trained) -> dict[str, float]:
    """How far apart mean gates are, as total variation, mean over adapters: `between` tokens of different groups and
    `within` one group, between its even and its odd windows; at the end of training and, `_start`, before it."""
    found = {}
    for suffix, step in (("", None), ("_start", 0)):
        apart = [_apart(*means) for means in _means(trained.model(step), trained)]
        found |= {"between" + suffix: fmean(a for a, _ in apart), "within" + suffix: fmean(b for _, b in apart)}
    return found


def _means(model: Transformer, trained: Trained) -> list[tuple[Tensor, Tensor]]:
    """For every mixture that serves all tokens: mean gates [2 g, e] by group and half, and their token counts [2 g]."""
    adapters: Any = adapters_of(model)
    mixtures = [m for layer in adapters.layers.values() for m in layer.each() if m.group is None]
    seen: dict[Mixture, list[Tensor]] = {mixture: [] for mixture in mixtures}
    hooks = [
        mixture.router.register_forward_hook(lambda _m, _x, routing, to=seen[mixture]: to.append(routing.dense()))
        for mixture in mixtures
    ]
    places = []
    with evaluating(model):
        for batch in trained.held_out(TOKENS):
            if bool(batch.keep.all()):
                score(model, batch, "fp32")
                half = torch.arange(len(batch.tokens))[:, None].expand_as(batch.tokens) % 2
                places.append((2 * batch.groups + half).flatten())
    for hook in hooks:
        hook.remove()
    place = torch.cat(places)
    count = torch.bincount(place, minlength=4).double()
    return [(_by_place(torch.cat(seen[mixture]).double(), place, count), count) for mixture in mixtures]


def _by_place(gates: Tensor, place: Tensor, count: Tensor) -> Tensor:
    total = gates.new_zeros(len(count), gates.shape[1]).index_add(0, place, gates)
    return total / count.clamp(min=1)[:, None]


def _apart(means: Tensor, count: Tensor) -> tuple[float, float]:
    """(between the first two groups, mean within them)."""
    parts, sizes = means.view(-1, 2, means.shape[1])[:2], count.view(-1, 2, 1)[:2]
    whole = (parts * sizes).sum(1) / sizes.sum(1)
    between = (whole[0] - whole[1]).abs().sum() / 2
    within = (parts[:, 0] - parts[:, 1]).abs().sum(-1) / 2
    return float(between), float(within.mean())

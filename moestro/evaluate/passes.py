"""How deep tokens go in stratified layers: the capacity that they request."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from moestro.data import Batch
from moestro.evaluate.perplexity import evaluating
from moestro.evaluate.scoring import score
from moestro.layers import StratifiedLayer
from moestro.model import Transformer
from moestro.routing import Trace

# Bands of tokens from rare to frequent, each with about as many tokens of the text.
BANDS = 4


def requested_capacity(traces: Sequence[Trace]) -> Float[Tensor, "t"]:
    """Passes that each token of the model made through one stratified layer, whose traces these are; the mean over its
    parts where it was split (Xu 2023, arXiv:2305.02176, section 3.2)."""
    first, *more = traces
    parts = _arrivals(first)
    return (parts + sum(_arrivals(trace) for trace in more)) / parts


def _arrivals(trace: Trace) -> Float[Tensor, "t"]:
    one = torch.ones(trace.routing.n_tokens, device=trace.x.device)
    return one if trace.origin is None else trace.origin.total(one)


def capacity_report(
    model: Transformer, batches: Iterable[Batch], *, precision: str = "fp32"
) -> dict[str, dict[str, Any]]:
    """Requested capacity of every stratified layer over all batches, by the layer's name: its `mean`; `passes`, the
    share of tokens that made 1, 2, ... of them (rounded for tokens in parts); and `by_frequency`, the mean in bands of
    about as many tokens each, from those whose word is rare in this text to those whose word is frequent.

    A model without stratified layers gives an empty report, without reading anything.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, StratifiedLayer)}
    if not layers:
        return {}
    words: list[Tensor] = []
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    with evaluating(model):
        for batch in batches:
            traces = score(model, batch, precision)[0].traces
            words.append(batch.tokens[batch.keep])
            for name, layer in layers.items():
                own = {id(moe) for moe in layer.passes}
                found[name].append(requested_capacity([trace for trace in traces if id(trace.layer) in own]).cpu())
    word = torch.cat(words)
    return {name: _figures(torch.cat(found[name]), word, len(layers[name].strata)) for name in layers}


def _figures(capacity: Float[Tensor, "t"], word: Int[Tensor, "t"], most: int) -> dict[str, Any]:
    count = torch.bincount(word)[word]
    bands = np.array_split(count.argsort(stable=True).numpy(), BANDS)
    passes = torch.bincount(capacity.round().long(), minlength=most + 1)[1:]
    return {
        "mean": float(capacity.double().mean()),
        "passes": (passes.double() / len(capacity)).tolist(),
        "by_frequency": [float(capacity[torch.from_numpy(band)].double().mean()) for band in bands if len(band)],
    }

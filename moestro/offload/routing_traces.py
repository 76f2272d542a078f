"""Traces of our own models' routers, any bank's: from a forward pass over text, without offloading anything."""

from pathlib import Path

import torch
from torch import Tensor

from moestro.experts.base import ExpertBank
from moestro.model import Transformer
from moestro.offload.chosen import chosen
from moestro.offload.trace import Header, Recorder, Trace, read_trace


def trace_of(model: Transformer, tokens: Tensor, path: Path, low: float = 0.25) -> Trace:
    """Record what the routers of `model` choose on sequences [b s], each token a pass of its own as in generation.

    Sizes are the bytes of every expert's weights: of feed-forward experts by their widths, of table rows (PEER) one row
    of each table; a LOW copy is taken to be `low` of that. Tokens with fewer experts than others (top-p) repeat their
    first with weight 0.

    Raises: ValueError for a model without mixtures; OffloadError for a routing that is not sparse.
    """
    layers = list(model.moe_layers().values())
    if not layers:
        raise ValueError("this model has no mixtures to trace")
    sizes = [_sizes(layer.bank) for layer in layers]
    top_k = max(round(layer.router.rows_per_token()) for layer in layers)
    lows = [[round(low * size) for size in layer] for layer in sizes]
    recorder = Recorder(path, Header(type(model).__name__, sizes, lows, top_k))
    with torch.no_grad():
        for sequence in tokens:
            recorder.start_sequence()
            every = [chosen(trace.routing) for trace in model(sequence[None]).traces]
            for position in range(len(sequence)):
                for layer, (ids, weights) in enumerate(every):
                    recorder.step(layer, ids[position : position + 1], weights[position : position + 1])
    recorder.close()
    if recorder.error is not None:
        raise recorder.error
    return read_trace(path)


def _sizes(bank: ExpertBank) -> list[int]:
    """Bytes of every expert's rows."""
    found = []
    for expert in range(bank.n_experts):
        parts = bank.weights_of(expert)
        found.append(sum(p[rows].numel() * p.element_size() for p, rows in parts))
    return found

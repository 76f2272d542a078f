"""Traces of our own models' routers, any bank's: from a forward pass over text, without offloading anything."""

from pathlib import Path

import torch
from torch import Tensor

from moestro.experts.base import ExpertBank
from moestro.model import Transformer
from moestro.offload.chosen import chosen
from moestro.offload.trace import Header, Recorder, Trace, read_trace
from moestro.routing import Trace as LayerTrace


def trace_of(model: Transformer, tokens: Tensor, path: Path, low: float = 0.25) -> Trace:
    """Record what the routers of `model` choose on sequences [b s], each token a pass of its own as in generation: with
    all of its parts where a layer splits it into heads, and no step for a stratum that it does not go through.

    Sizes are the bytes of every expert's weights: of feed-forward experts by their widths, of table rows (PEER) one row
    of each table; a LOW copy is taken to be `low` of that. Tokens with fewer experts than others (top-p) repeat their
    first with weight 0.

    Raises: ValueError for a model without mixtures; OffloadError for a routing that is not sparse.
    """
    layers = list(model.moe_layers().values())
    if not layers:
        raise ValueError("this model has no mixtures to trace")
    number = {id(layer): i for i, layer in enumerate(layers)}
    sizes = [_sizes(layer.bank) for layer in layers]
    top_k = max(round(layer.router.rows_per_token()) for layer in layers)
    lows = [[round(low * size) for size in layer] for layer in sizes]
    recorder = Recorder(path, Header(type(model).__name__, sizes, lows, top_k))
    with torch.no_grad():
        for sequence in tokens:
            recorder.start_sequence()
            traces = [trace for trace in model(sequence[None]).traces if trace.routing.n_tokens]
            every = [(number[id(trace.layer)], _tokens(trace), *chosen(trace.routing)) for trace in traces]
            for position in range(len(sequence)):
                for layer, token, ids, weights in every:
                    if (mine := token == position).any():
                        recorder.step(layer, ids[mine], weights[mine])
    recorder.close()
    if recorder.error is not None:
        raise recorder.error
    return read_trace(path)


def _tokens(trace: LayerTrace) -> Tensor:
    """Which token of the model each routed one is, or is a part of."""
    return torch.arange(trace.routing.n_tokens) if trace.origin is None else trace.origin.token.cpu()


def _sizes(bank: ExpertBank) -> list[int]:
    """Bytes of every expert's rows."""
    found = []
    for expert in range(bank.n_experts):
        parts = bank.weights_of(expert)
        found.append(sum(p[rows].numel() * p.element_size() for p, rows in parts))
    return found

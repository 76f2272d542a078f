"""How a model's mixture layers use their experts on given text."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from moestro.cost import NOTHING
from moestro.data import Batch
from moestro.evaluate.perplexity import evaluating
from moestro.evaluate.scoring import exact_dtype, score
from moestro.layers import MoELayer
from moestro.model import Transformer
from moestro.routing import Trace

# Layers of more experts report a histogram of loads in place of the list.
MAX_LISTED = 4096


class LayerUsage:
    """Totals of one layer's traces: rows and gates of every expert, experts and width of every token."""

    def __init__(self, layer: MoELayer) -> None:
        self.layer = layer
        self.load: Tensor | float = 0.0
        self.gates: Tensor | float = 0.0
        self.routed = 0
        self.experts: list[np.ndarray] = []
        self.width: list[np.ndarray] = []
        self.different = 0.0
        self.rows = self.wanted = 0
        self.flops = NOTHING

    def add(self, trace: Trace) -> None:
        """Count one trace."""
        exact = exact_dtype(trace.x.device)
        self.load = self.load + trace.routing.load().to(exact)
        self.gates = self.gates + trace.routing.importance().to(exact)
        self.routed += trace.routing.n_tokens
        self.rows += trace.routing.n_rows
        self.wanted += trace.routing.as_wanted().n_rows
        self.flops = self.flops + trace.flops().item()
        self.different += float(trace.different_experts().sum())
        self.experts.append(trace.experts_per_token().float().cpu().numpy())
        self.width.append(trace.active_width().float().cpu().numpy())

    def figures(self) -> dict[str, Any]:
        """The layer's entry in the report."""
        load, gates = torch.as_tensor(self.load).cpu(), torch.as_tensor(self.gates).cpu()
        listed = len(load) <= MAX_LISTED
        experts = np.concatenate(self.experts)
        return {
            "n_experts": len(load),
            "tokens": len(experts),
            "routed": self.routed,
            "widths": expert_widths(self.layer, len(load)) if listed else None,
            "load": load.tolist() if listed else None,
            "load_histogram": None if listed else histogram(load),
            "rows": {"wanted": self.wanted, "useful": self.rows},
            "flops": {"useful": self.flops.useful, "computed": self.flops.computed},
            "experts_per_token": spread(experts),
            "different_experts": self.different / max(1, len(experts)),
            "active_width": spread(np.concatenate(self.width)),
            "unevenness": unevenness(gates),
            "usage": float((gates > 0).double().mean()),
            "dead": float((load == 0).double().mean()),
        }


def routing_report(
    model: Transformer, batches: Iterable[Batch], *, precision: str = "fp32"
) -> dict[str, dict[str, Any]]:
    """Figures of every mixture layer over all batches, by the layer's name in the model.

    `load`: rows (tokens) each expert computed. `routed`: tokens that reached this layer, or parts of tokens; `tokens`
    are the model's. `rows`: what tokens asked for, and what is left where a capacity drops some; `flops`: forward FLOPs
    of the layer, useful and computed. `experts_per_token` and `active_width`: mean, p50, p99 over the model's tokens;
    `different_experts`: mean number of different ones among them, where the parts of a token may share experts.
    `unevenness`: KL of the experts' shares of the gates from uniform, in nats; `usage`: share of experts that got any
    gate; both as in PEER (He 2024, arXiv:2407.04153, Table 2) and both dependent on `tokens`, so report it with them.
    `dead`: share of experts without a row. Layers of more than 4096 experts have `load_histogram` in place of `load`
    and `widths`. A model without mixture layers gives an empty report.
    """
    layers = model.moe_layers()
    names = {id(layer): name for name, layer in layers.items()}
    usage: dict[str, LayerUsage] = {}
    with evaluating(model):
        for batch in batches:
            output, _ = score(model, batch, precision)
            for trace in output.traces:
                name = names[id(trace.layer)]
                usage.setdefault(name, LayerUsage(layers[name])).add(trace)
    return {name: layer.figures() for name, layer in usage.items()}


def unevenness(gates: Float[Tensor, "e"]) -> float:
    """log N + sum_i z_i log z_i, z the experts' shares of all gates: 0 when even, log N when one expert has all. Where
    all gates are 0, as those of ReLU may be, nobody has more than another: 0."""
    gates = gates.double()
    if not gates.any():
        return 0.0
    shares = gates / gates.sum()
    return math.log(len(shares)) + float(torch.special.xlogy(shares, shares).sum())


def spread(values: np.ndarray) -> dict[str, float]:
    """Mean, median and 99th percentile."""
    p50, p99 = np.percentile(values, [50, 99])
    return {"mean": float(values.mean(dtype=np.float64)), "p50": float(p50), "p99": float(p99)}


def expert_widths(layer: MoELayer, n_experts: int) -> list[int]:
    """Hidden units of every expert."""
    widths = layer.expert_widths()
    return [int(w) for w in widths.tolist()] if isinstance(widths, Tensor) else [int(widths)] * n_experts


def histogram(load: Float[Tensor, "e"]) -> dict[str, list[int]]:
    """Number of experts by load: bin i has loads from edges[i] up to below edges[i + 1]; 0, then powers of two."""
    top = max(1, int(load.max()))
    edges = [0, 1, *(2**power for power in range(1, top.bit_length() + 1))]
    counts, _ = np.histogram(load.numpy(), bins=np.asarray(edges, dtype=np.float64))
    return {"edges": edges, "experts": counts.tolist()}

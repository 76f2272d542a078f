"""How much an expert belongs to one kind of token."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from moestro.data import Batch
from moestro.evaluate.perplexity import evaluating
from moestro.evaluate.scoring import exact_dtype, score
from moestro.model import Transformer

# Layers of more experts are refused: their weights are written out for every token.
MOST = 4096


def expert_purity(
    model: Transformer, batches: Iterable[Batch], *, precision: str = "fp32"
) -> dict[str, dict[str, Any]]:
    """Of every mixture layer, by its name, on held-out text:

    `purity` [e], the share of an expert's total weight that falls on the token (of the vocabulary) with most of it,
    None for an expert without any (Oldfield 2024, muMoE, arXiv:2402.12550, has this for classes of images); their mean
    weighted by that total, `mean_purity`; `text_purity`, that of an expert with equal weight everywhere; and `active`,
    the mean number of experts a token gives any weight.

    Raises: ValueError for layers of more than 4096 experts, and for those that do not route the model's tokens one by
    one.
    """
    weight: dict[str, Tensor] = {}
    active: dict[str, Tensor] = {}
    seen: Tensor | None = None
    layers = model.moe_layers()
    with evaluating(model):
        for batch in batches:
            traces = score(model, batch, precision)[0].traces
            label = batch.tokens[batch.keep].to(next(model.parameters()).device)
            one = torch.bincount(label, minlength=model.vocab_size)
            seen = one if seen is None else seen + one
            for name, layer in layers.items():
                gates = _gates(name, [trace for trace in traces if trace.layer is layer])
                zeros = gates.new_zeros(gates.shape[1], model.vocab_size)
                weight[name] = weight.get(name, zeros).index_add(1, label, gates.T)
                active[name] = active.get(name, zeros.new_zeros(())) + (gates > 0).sum()
    if seen is None:
        raise ValueError("nothing to evaluate: there are no batches")
    return {name: _figures(weight[name], active[name], seen) for name in layers}


def _gates(name: str, traces: list[Any]) -> Tensor:
    if len(traces) != 1 or traces[0].origin is not None or traces[0].routing.meetings() is None:
        raise ValueError(
            f"{name} does not route the model's tokens one by one, so that no expert has a token of its own"
        )
    routing = traces[0].routing
    if routing.n_experts > MOST:
        raise ValueError(f"{name}: {routing.n_experts} experts, allowed: {MOST}")
    return routing.dense().to(exact_dtype(routing.dense().device))


def _figures(weight: Tensor, active: Tensor, seen: Tensor) -> dict[str, Any]:
    total = weight.sum(1)
    purity = weight.amax(1) / total.clamp(min=torch.finfo(total.dtype).tiny)
    return {
        "purity": [value if used > 0 else None for value, used in zip(purity.tolist(), total.tolist(), strict=True)],
        "mean_purity": float(weight.amax(1).sum() / total.sum()),
        "text_purity": float(seen.max() / seen.sum()),
        "active": float(active / seen.sum()),
    }

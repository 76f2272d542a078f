"""What each expert is worth on the tokens of every other: experts that serve a layer alone."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moestro.data import Batch
from moestro.evaluate.perplexity import evaluating
from moestro.evaluate.scoring import exact_dtype, score
from moestro.layers import MoELayer
from moestro.model import Transformer
from moestro.routers import Router
from moestro.routing import Routing, SlotRouting, SparseRouting, Trace

# Layers of more experts are not probed: each costs a pass over the text.
MOST = 64


class OneExpert(Router):
    """Every token to one expert, with the sum of the weights that its own router gives it: only who serves changes."""

    def __init__(self, router: Router, expert: int) -> None:
        super().__init__()
        self.router, self.expert, self.n_experts = router, expert, router.n_experts
        self.follows, self.causal = router.follows, router.causal

    def forward(self, x: Float[Tensor, "t d"], *earlier: Routing) -> SparseRouting:
        routing = self.router(x, *earlier)
        weight = routing.dense().sum(1, keepdim=True)
        expert = torch.full_like(weight, self.expert, dtype=torch.int64)
        return SparseRouting.from_topk(expert, weight, self.n_experts, routing.logits, raw=routing.raw)

    def flops(self, n_tokens: int) -> float:
        return self.router.flops(n_tokens)

    def rows_per_token(self) -> float:
        return 1.0


@contextmanager
def served_by(layer: MoELayer, expert: int) -> Iterator[None]:
    """The layer with every token served by one expert; afterwards it is as it was."""
    router = layer.router
    try:
        layer.router = OneExpert(router, expert)
        yield
    finally:
        layer.router = router


def expert_probe(
    model: Transformer, batches: Callable[[], Iterable[Batch]], *, precision: str = "fp32"
) -> dict[str, dict[str, Any]]:
    """For every mixture layer, by its name: the tokens grouped by the expert that gets their greatest weight (as the
    model is), and the next-token loss of each group when one expert alone serves that layer (Xie 2024, MoDE,
    arXiv:2402.00893, "expert probing"; the definition is ours).

    `tokens` [e] of every group; `as_routed` [e], nats a token of the group with the model as it is; `loss` [e][e], with
    row g the group of expert g and column e the expert that serves it. None where a group has no tokens. `own` and
    `foreign` are the means over tokens of the diagonal and over tokens and columns of the rest.

    One pass over the text for every expert of every layer, and one more. Reads the model and changes nothing.

    Raises: ValueError where the model has no mixture layers, one that does not route the model's tokens one by one, or
    one of more than 64 experts.
    """
    layers = model.moe_layers()
    if not layers:
        raise ValueError("the model has no mixture layers to probe")
    for name, layer in layers.items():
        if layer.router.n_experts > MOST:
            raise ValueError(f"{name}: {layer.router.n_experts} experts, each a pass over the text; allowed: {MOST}")
    with evaluating(model):
        losses, groups = _as_it_is(model, batches(), layers, precision)
        found = {}
        for name, layer in layers.items():
            rows = []
            for expert in range(layer.router.n_experts):
                with served_by(layer, expert):
                    rows.append(torch.cat([loss for loss, _ in _passes(model, batches(), precision)]))
            found[name] = _figures(groups[name], losses, torch.stack(rows))
    return found


def _passes(
    model: Transformer, batches: Iterable[Batch], precision: str
) -> Iterator[tuple[Float[Tensor, "t"], tuple[Trace, ...]]]:
    """Nats of every target token, and the traces, batch after batch."""
    for batch in batches:
        output, losses = score(model, batch, precision)
        yield losses[batch.keep.to(losses.device)].to(exact_dtype(losses.device)), output.traces


def _as_it_is(
    model: Transformer, batches: Iterable[Batch], layers: dict[str, MoELayer], precision: str
) -> tuple[Float[Tensor, "t"], dict[str, Int[Tensor, "t"]]]:
    """Nats of every token with the model as it is, and each layer's preferred expert of every token."""
    losses: list[Tensor] = []
    groups: dict[str, list[Tensor]] = {name: [] for name in layers}
    for loss, traces in _passes(model, batches, precision):
        losses.append(loss)
        for name, layer in layers.items():
            groups[name].append(_preferred(name, [trace for trace in traces if trace.layer is layer]))
    if not losses:
        raise ValueError("nothing to evaluate: there are no batches")
    return torch.cat(losses), {name: torch.cat(found) for name, found in groups.items()}


def _preferred(name: str, traces: list[Trace]) -> Int[Tensor, "t"]:
    if len(traces) != 1 or traces[0].origin is not None or isinstance(traces[0].routing, SlotRouting):
        raise ValueError(
            f"{name} does not route the model's tokens one by one, so that no expert could serve them alone"
        )
    return traces[0].routing.first_choice()


def _figures(group: Int[Tensor, "t"], losses: Float[Tensor, "t"], alone: Float[Tensor, "e t"]) -> dict[str, Any]:
    n_experts = len(alone)
    tokens = torch.bincount(group, minlength=n_experts)
    count = tokens.to(losses)

    def by_group(values: Float[Tensor, "*m t"]) -> Float[Tensor, "*m e"]:
        zeros = values.new_zeros(*values.shape[:-1], n_experts)
        return zeros.index_add(-1, group, values) / count.clamp(min=1)

    table = by_group(alone).T
    served = table * count[:, None]
    own = served.diagonal().sum()
    others = max(1, n_experts - 1)
    return {
        "tokens": tokens.tolist(),
        "as_routed": _listed(by_group(losses), tokens),
        "loss": [row if n else None for row, n in zip(table.tolist(), tokens.tolist(), strict=True)],
        "own": float(own / count.sum()),
        "foreign": float((served.sum() - own) / count.sum() / others),
    }


def _listed(values: Float[Tensor, "e"], tokens: Int[Tensor, "e"]) -> list[float | None]:
    return [value if n else None for value, n in zip(values.tolist(), tokens.tolist(), strict=True)]

"""What can be turned without training: how many experts a token gets, and what each setting costs and is worth."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from moestro.data import Batch
from moestro.evaluate.perplexity import evaluating
from moestro.evaluate.scoring import score
from moestro.model import Transformer

THRESHOLDS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
# `threshold` is top-p's, `top_k` that of top-k, biased and product-key routers.
KNOBS = ("threshold", "top_k")


def knobs(model: Transformer) -> dict[str, list[Any]]:
    """The parts (selections or routers) that have each knob, in layer order; knobs that none has are left out."""
    parts = [turnable(layer.router) for layer in model.moe_layers().values()]
    found = {knob: [part for part in parts if hasattr(part, knob)] for knob in KNOBS}
    return {knob: having for knob, having in found.items() if having}


def setting(model: Transformer, knob: str) -> float | None:
    """The knob's value; None where layers differ."""
    values = {getattr(part, knob) for part in knobs(model)[knob]}
    return values.pop() if len(values) == 1 else None


def allowed(model: Transformer, knob: str) -> tuple[float, float]:
    """Least and greatest value that every layer with this knob takes.

    Raises: ValueError where no layer has it.
    """
    if knob not in (there := knobs(model)):
        raise ValueError(f"knob {knob!r}: no layer has it; allowed: {', '.join(there) or 'none'}")
    if knob == "threshold":
        return 0.0, 1.0
    routers = [layer.router for layer in model.moe_layers().values()]
    return 1, min(router.most_experts for router in routers if hasattr(turnable(router), knob))


def turnable(part: Any) -> Any:
    """What has the knobs: the innermost selection of a router, or the router where it has none."""
    return turnable(part.select) if hasattr(part, "select") else part


@contextmanager
def turned(model: Transformer, knob: str, value: float) -> Iterator[None]:
    """The model with a knob of all its layers at `value`; afterwards everything is as it was.

    Raises: ValueError where no layer has the knob, or one cannot take the value.
    """
    least, greatest = allowed(model, knob)
    if not least <= value <= greatest or (knob == "top_k" and value != int(value)):
        raise ValueError(f"{knob}={value}, allowed: {'whole numbers ' if knob == 'top_k' else ''}{least} to {greatest}")
    before = [(part, getattr(part, knob)) for part in knobs(model)[knob]]
    try:
        for part, _ in before:
            setattr(part, knob, value)
        yield
    finally:
        for part, old in before:
            setattr(part, knob, old)


def ladder(model: Transformer, knob: str) -> list[float]:
    """Settings worth trying, rising, the present one among them: all thresholds, or k up to about twice the present."""
    least, greatest = allowed(model, knob)
    now = [getattr(part, knob) for part in knobs(model)[knob]]
    if knob == "top_k":
        greatest = min(greatest, 2 * max(now) + 2)
    tried = THRESHOLDS if knob == "threshold" else COUNTS
    present = {now[0]} if len(set(now)) == 1 else set()
    return sorted({value for value in tried if least <= value <= greatest} | present)


def quality_curve(
    model: Transformer,
    batches: Callable[[], Iterable[Batch]],
    knob: str,
    values: Sequence[float] | None = None,
    *,
    precision: str = "fp32",
) -> dict[str, Any]:
    """{"now": the present setting, "points": [{"value": v, **spending(...)}]} on the same text at every setting."""
    points = []
    for value in ladder(model, knob) if values is None else values:
        with turned(model, knob, value):
            points.append({"value": value, **spending(model, batches(), precision=precision)})
    return {"now": setting(model, knob), "points": points}


def spending(model: Transformer, batches: Iterable[Batch], *, precision: str = "fp32") -> dict[str, float]:
    """What a token costs and is worth: `bpb`; `params_active` (parameters a token touches), `active_width` (hidden
    units of experts, all layers) and `experts` (routed experts a layer): means over tokens; forward `flops` a token.

    Raises: ValueError where there is nothing to evaluate.
    """
    total = dict.fromkeys(("nats", "params_active", "active_width", "experts", "flops"), 0.0)
    mixtures = model.n_mixtures()
    tokens = n_bytes = 0
    with evaluating(model):
        for batch in batches:
            output, losses = score(model, batch, precision)
            n, traces = int(batch.keep.sum()), output.traces
            rows, length = batch.tokens.shape
            tokens, n_bytes = tokens + n, n_bytes + int(batch.n_bytes.sum())
            total["nats"] += float(losses.double().sum())
            total["params_active"] += n * float(model.active_parameters(traces))
            total["active_width"] += sum(float(trace.active_width().double().sum()) for trace in traces)
            total["experts"] += sum(float(trace.experts_per_token().sum()) for trace in traces) / max(1, mixtures)
            total["flops"] += float(model.flops(rows, length, traces).useful)
    if not tokens or not n_bytes:
        raise ValueError(f"nothing to evaluate: the batches hold {tokens} target tokens, {n_bytes} bytes")
    bpb = total.pop("nats") / n_bytes / math.log(2)
    return {"bpb": bpb, **{name: value / tokens for name, value in total.items()}}

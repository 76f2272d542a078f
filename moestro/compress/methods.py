"""The ways to make a plan, by the names that the command line has for them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import moestro
from moestro.compress.feasible import STOCK, Limits, Output, Wanted, check_method, check_request, limits_of
from moestro.compress.fingerprint import fingerprint
from moestro.compress.plan import LayerPlan, Plan, PlanError, Semantics
from moestro.compress.router_norms import kept_by_change, require_moved, router_norm_changes
from moestro.compress.source import RunSource, open_source
from moestro.compress.widths import unit_norms, wide_enough
from moestro.formats import Checkpoint


@dataclass(frozen=True)
class Request:
    """What a plan is asked for: this share of the routed experts of `source` is to go, as many in every layer unless
    `per_layer`.

    `reference` is the checkpoint before fine-tuning; `text` (a file, folder or source), `tokens` and `seq_len` are what
    a method that looks at text reads of it, on `device`. `options` are the method's own, by name. `folder` is where the
    plan will lie, for what a method leaves beside it.
    """

    source: Path
    method: str
    ratio: float
    output: Output = STOCK
    semantics: Semantics = "slice"
    per_layer: bool = False
    reference: Path | None = None
    text: str | None = None
    tokens: int = 65_536
    seq_len: int = 512
    device: str = "cpu"
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None


def checked(request: Request) -> tuple[Checkpoint | RunSource, Limits, dict[int, int]]:
    """The source, what its routers ask for, and how many experts every layer keeps where all lose the same share.

    Raises: InfeasibleError where that cannot be routed, or not be written in a folder of this kind; PlanError for an
    impossible ratio. Nothing was measured by then.
    """
    if not 0 <= request.ratio < 1:
        raise PlanError(f"ratio={request.ratio}, allowed: 0 to below 1 (the share of routed experts that goes)")
    source = open_source(request.source)
    limits, layers = limits_of(source), (*source.moe_layers, *source.extra_layers)
    share = 0.0 if request.method in KEEPS_EXPERTS else request.ratio
    kept = {layer: limits.n_kept(source.n_experts(layer), share) for layer in layers}
    different = request.per_layer and not request.output.uniform
    if request.ratio > 0:
        check_request(source, request.output.layout, request.semantics, different)
    return source, limits, kept


def made(request: Request, layers: Sequence[LayerPlan], **more: Any) -> Plan:
    """The plan of a request: these layers, and how they came about."""
    return Plan(
        request.method,
        request.ratio,
        fingerprint(open_source(request.source)),
        tuple(layers),
        request.semantics,
        options=dict(request.options),
        seed=request.seed,
        versions=versions(),
        **more,
    )


def versions() -> dict[str, str]:
    """Versions of what made a plan."""
    return {"moestro": moestro.__version__, "torch": torch.__version__, "safetensors": version("safetensors")}


def option(request: Request, allowed: Mapping[str, Any]) -> dict[str, Any]:
    """The method's options, defaults filled in.

    Raises: PlanError for one that it does not have, or of another type.
    """
    for name, value in request.options.items():
        if name not in allowed:
            raise PlanError(f"{request.method} has no option {name!r}, allowed: {', '.join(allowed) or 'none'}")
        if type(value) is not type(allowed[name]):
            raise PlanError(f"option {name}={value!r}, allowed: {type(allowed[name]).__name__}")
    return {**allowed, **request.options}


def by_router_norms(request: Request) -> Plan:
    """Provable pruning: the experts whose router rows' norms grew least between `reference` and the source go.

    Options: `center`, `fold_norm`, `force` (prune also where the routers did not move).
    """
    chosen = option(request, {"center": False, "fold_norm": False, "force": False})
    if request.reference is None:
        raise PlanError("router-norm compares with the checkpoint before fine-tuning: say where it is (--reference)")
    source, limits, kept = checked(request)
    reference = open_source(request.reference)
    changes = router_norm_changes(reference, source, chosen["center"], chosen["fold_norm"])
    if not chosen["force"] and request.ratio > 0:
        require_moved(changes)
    layers = [
        LayerPlan(
            layer,
            len(change),
            kept_by_change(change, kept[layer], limits.n_group),
            scores={"router_norm_change": change.tolist()},
        )
        for layer, change in changes.items()
    ]
    return made(request, layers, reference=fingerprint(reference))


def by_unit_norms(request: Request) -> Plan:
    """All experts stay and become narrower: the hidden units whose weights are smallest go, the same share of every
    expert, or (`per_layer`) of all experts of a layer together, which leaves experts of different widths."""
    option(request, {})
    source, _, _ = checked(request)
    check_method(source, request.output, request.per_layer, Wanted(narrows=request.ratio > 0))
    plans = []
    for layer in source.moe_layers:
        sizes = [unit_norms(source, layer, expert) for expert in range(source.n_experts(layer))]
        units = wide_enough(sizes, request.ratio, together=request.per_layer)
        plans.append(LayerPlan(layer, len(sizes), tuple(range(len(sizes))), units=units if request.ratio else None))
    return made(request, plans)


# Methods of `moestro.compress.text_methods`.
MEASURED = (
    *("frequency", "gate-sum", "man", "reap", "random", "recon"),
    *("moe-i2", "svd", "merge", "hc-smoe", "auto"),
)


def by_measuring(request: Request) -> Plan:
    """Any method that runs the model on text."""
    # which needs transformers
    from moestro.compress.measured import plan_by_measuring

    return plan_by_measuring(request)


METHODS: dict[str, Callable[[Request], Plan]] = {
    "router-norm": by_router_norms,
    "width": by_unit_norms,
    **dict.fromkeys(MEASURED, by_measuring),
}
# Methods that remove something else than experts.
KEEPS_EXPERTS = frozenset({"width", "svd"})

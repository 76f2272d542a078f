"""The ways to make a plan, by the names that the command line has for them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import moestro
from moestro.compress.feasible import STOCK, Limits, Output, check_request, limits_of
from moestro.compress.fingerprint import fingerprint
from moestro.compress.plan import LayerPlan, Plan, PlanError, Semantics
from moestro.compress.router_norms import kept_by_change, require_moved, router_norm_changes
from moestro.formats import Checkpoint


@dataclass(frozen=True)
class Request:
    """What a plan is asked for: this share of the routed experts of `source` is to go, as many in every layer unless
    `per_layer`.

    `reference` is the checkpoint before fine-tuning; `text` (a file, folder or source), `tokens` and `seq_len` are what
    a method that looks at text reads of it, on `device`. `options` are the method's own, by name. `folder` is where the
    plan will lie, for tensors that a method leaves beside it.
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


def checked(request: Request) -> tuple[Checkpoint, Limits, dict[int, int]]:
    """The source, what its routers ask for, and how many experts every layer keeps where all lose the same share.

    Raises: InfeasibleError where that cannot be routed, or not be written in a folder of this kind; PlanError for an
    impossible ratio. Nothing was measured by then.
    """
    if not 0 <= request.ratio < 1:
        raise PlanError(f"ratio={request.ratio}, allowed: 0 to below 1 (the share of routed experts that goes)")
    checkpoint = Checkpoint(request.source)
    limits = limits_of(checkpoint)
    layers = (*checkpoint.moe_layers, *checkpoint.extra_layers)
    kept = {layer: limits.n_kept(checkpoint.n_experts(layer), request.ratio) for layer in layers}
    different = request.per_layer and not request.output.uniform
    if request.ratio > 0:
        check_request(checkpoint, request.output.layout, request.semantics, different)
    return checkpoint, limits, kept


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
    checkpoint, limits, kept = checked(request)
    reference = Checkpoint(request.reference)
    changes = router_norm_changes(reference, checkpoint, chosen["center"], chosen["fold_norm"])
    if not chosen["force"] and request.ratio > 0:
        require_moved(changes)
    layers = tuple(
        LayerPlan(
            layer,
            len(change),
            kept_by_change(change, kept[layer], limits.n_group),
            scores={"router_norm_change": change.tolist()},
        )
        for layer, change in changes.items()
    )
    return Plan(
        request.method,
        request.ratio,
        fingerprint(checkpoint),
        layers,
        request.semantics,
        options=chosen,
        seed=request.seed,
        reference=fingerprint(reference),
        versions=versions(),
    )


# Methods of `moestro.compress.measured`.
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
    **dict.fromkeys(MEASURED, by_measuring),
}

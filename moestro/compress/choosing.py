"""Several plans of one model, measured on text that calibration did not use alone, and the best of them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import nn

from moestro.compress.applied import applied
from moestro.compress.plan import LayerPlan, PlanError, Semantics, rows_of
from moestro.data import Batch
from moestro.evaluate import evaluate


def measured(
    model: nn.Module, plans: Mapping[str, Sequence[LayerPlan]], batches: Sequence[Batch], semantics: Semantics
) -> dict[str, float]:
    """Nats a token of every plan's model, all of them plans of `model`."""
    return {n: evaluate(applied(model, p, semantics, rows_of(p)), batches)["loss"] for n, p in plans.items()}


def chosen_by_measuring(
    model: nn.Module,
    methods: Mapping[str, Callable[[], list[LayerPlan]]],
    batches: Sequence[Batch],
    semantics: Semantics = "slice",
) -> list[LayerPlan]:
    """The plan of the least loss on the batches; ties go to the method named first. Every layer's `scores` say under
    "loss of METHOD" what each method came to, the same number for every expert.

    Raises: ValueError where no method is named; PlanError where the loss of a plan is no number.
    """
    if not methods:
        raise ValueError("no methods to choose from")
    plans = {name: make() for name, make in methods.items()}
    losses = measured(model, plans, batches, semantics)
    if broken := {name: loss for name, loss in losses.items() if not math.isfinite(loss)}:
        found = ", ".join(f"{name}: {loss}" for name, loss in broken.items())
        raise PlanError(f"losses to choose by: {found}, allowed: finite numbers; choose among other criteria")
    best = min(losses, key=losses.__getitem__)
    return [
        replace(plan, scores={**plan.scores, **{f"loss of {m}": [v] * plan.n_experts for m, v in losses.items()}})
        for plan in plans[best]
    ]

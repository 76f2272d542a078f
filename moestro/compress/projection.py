"""A plan with as many experts in every layer, nearest to one with different numbers."""

from dataclasses import replace

from moestro.compress.feasible import Limits
from moestro.compress.plan import LayerPlan, Plan, PlanError


def uniform(plan: Plan, limits: Limits) -> Plan:
    """The plan in which every layer, and every routing group of it, keeps as many experts as the largest does: removed
    ones come back by their score (the first that the plan lists), the highest first, or by their number without.

    Raises: PlanError where the plan does more than remove experts.
    """
    for layer in plan.layers:
        if layer.merges or layer.factors or layer.narrows or plan.semantics != "slice":
            raise PlanError(f"layer {layer.layer}: only plans that remove experts under 'slice' can be made uniform")
    size = max(count for layer in plan.layers for count in limits.per_group(layer))
    layers = tuple(_filled(layer, limits, size) for layer in plan.layers)
    return replace(plan, layers=layers, options={**plan.options, "uniform": True})


def _filled(layer: LayerPlan, limits: Limits, size: int) -> LayerPlan:
    scores = next(iter(layer.scores.values()), [0.0] * layer.n_experts)
    keep = set(layer.keep)
    for group, count in enumerate(limits.per_group(layer)):
        gone = [
            expert
            for expert in range(layer.n_experts)
            if expert not in keep and limits.group_of(expert, layer.n_experts) == group
        ]
        keep.update(sorted(gone, key=lambda expert: (-scores[expert], expert))[: size - count])
    return replace(layer, keep=tuple(sorted(keep)), groups=None, ranks=None, units=None)

"""Methods that remove experts: from what calibration collected to the plan of every layer."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import nn

from moestro.compress.applied import layer_number
from moestro.compress.budget import share_of
from moestro.compress.calibration import Collected, sampled_inputs
from moestro.compress.criteria import CRITERIA, highest, random_scores, removed, skip_threshold
from moestro.compress.damage import Damage
from moestro.compress.masking import without
from moestro.compress.observed import Observed
from moestro.compress.plan import LayerPlan
from moestro.compress.search import Choice, Found, Genetic, Subset, least_damage
from moestro.data import Batch
from moestro.layers.moe import MoELayer
from moestro.routers import BiasedRouter, ScoredRouter, TopK

# Criteria that `by_scores` knows.
SCORED = (*CRITERIA, "random")


@dataclass(frozen=True)
class Subject:
    """A decoder and what calibration collected of it."""

    model: nn.Module
    collected: Collected
    seed: int = 0

    @property
    def layers(self) -> dict[str, MoELayer]:
        """Its mixture layers by name."""
        return self.model.moe_layers()  # type: ignore[operator]

    def seen(self, name: str) -> Observed:
        """What was collected of one layer."""
        return self.collected.layers[name]

    def damage(self, name: str) -> Damage:
        """The damage of removing experts from one layer, on the sampled tokens.

        Raises: ValueError where no tokens were sampled.
        """
        inputs = self.seen(name).inputs
        if inputs is None:
            raise ValueError(f"{name}: no tokens were sampled to measure damage on (sample=0)")
        like = next(self.layers[name].parameters())
        return Damage(self.layers[name], inputs.to(like.device))


def groups_of(layer: MoELayer) -> int:
    """Groups of consecutive experts that the router ranks, which must stay equal; 1 where it does not."""
    router = layer.router
    limit = getattr(router, "limit", getattr(getattr(router, "select", None), "limit", None))
    return limit.n_groups if limit is not None and limit.limits else 1


def most_removed(layer: MoELayer) -> int:
    """Experts that may go so that a token still finds as many as it takes: E - k for top-k, E - 1 where k is not
    fixed."""
    router = layer.router
    chosen = router.select if isinstance(router, ScoredRouter) else router
    least = chosen.top_k if isinstance(chosen, TopK | BiasedRouter) else 1
    return router.n_experts - least


def uniform(subject: Subject, ratio: float) -> dict[str, int]:
    """Experts to remove of every layer, the same share of each: ratio E, halves up, down to whole routing groups.

    Raises: ValueError where a layer would be left with fewer than a token takes.
    """
    counts = {}
    for name, layer in subject.layers.items():
        groups = groups_of(layer)
        count = share_of(ratio, layer.router.n_experts) // groups * groups
        if not 0 <= count <= most_removed(layer):
            raise ValueError(f"{name}: {count} of {layer.router.n_experts} experts, allowed: {most_removed(layer)}")
        counts[name] = count
    return counts


def plan_of(
    subject: Subject, name: str, gone: Sequence[int], chosen_by: Mapping[str, Sequence[float]] | None = None
) -> LayerPlan:
    """The plan of a layer that loses these experts, with the scores, rows and entropy that reports show; the scores
    that it was made by come first."""
    seen = subject.seen(name)
    scores = {criterion: list(values) for criterion, values in (chosen_by or {}).items()}
    scores = scores | {c: score(seen).tolist() for c, score in CRITERIA.items() if c not in scores}
    entropy = float(seen.entropy) / seen.tokens if "entropy" in seen.sums else None
    return LayerPlan(
        layer_number(name),
        seen.n_experts,
        removed(gone, seen.n_experts),
        scores=scores,
        rows=tuple(int(rows) for rows in seen.rows.tolist()),
        entropy=entropy,
    )


def by_scores(subject: Subject, criterion: str, counts: Mapping[str, int]) -> list[LayerPlan]:
    """The experts of the highest scores stay; criteria are those of `CRITERIA`, and random.

    Raises: ValueError for an unknown criterion.
    """
    if criterion not in SCORED:
        raise ValueError(f"criterion={criterion!r}, allowed: {', '.join(SCORED)}")
    plans = []
    for name, layer in subject.layers.items():
        seen = subject.seen(name)
        if criterion == "random":
            scores = random_scores(seen.n_experts, subject.seed, layer_number(name))
        else:
            scores = CRITERIA[criterion](seen)
        keep = highest(scores, seen.n_experts - counts[name], groups_of(layer))
        plans.append(plan_of(subject, name, removed(keep, seen.n_experts), {criterion: scores.tolist()}))
    return plans


def searched(
    subject: Subject, counts: Mapping[str, int], n_best: int = 1, enumerable: int = 5000, genetic: Genetic | None = None
) -> dict[str, Found]:
    """For every layer the sets of experts whose removal does it least damage, of all where they can be looked at.

    Raises: ValueError where they cannot, and no `genetic` search is given.
    """
    found = {}
    for name in subject.layers:
        damage = subject.damage(name) if counts[name] else lambda subset: 0.0
        found[name] = _found(subject, name, counts[name], damage, n_best, enumerable, genetic)
    return found


def _found(
    subject: Subject,
    name: str,
    count: int,
    damage: Callable[[Subset], float],
    n_best: int,
    enumerable: int,
    genetic: Genetic | None,
) -> Found:
    layer = subject.layers[name]
    choice = Choice(layer.router.n_experts, count, groups_of(layer) if count else 1)
    return least_damage(damage, choice, n_best, 1_000_003 * subject.seed + layer_number(name), enumerable, genetic)


def by_damage(
    subject: Subject, counts: Mapping[str, int], enumerable: int = 5000, genetic: Genetic | None = None
) -> list[LayerPlan]:
    """NAEE (Lu 2024, arXiv:2402.14800): of every layer, the set of experts whose removal changes its output least."""
    found = searched(subject, counts, 1, enumerable, genetic)
    alone = {name: {"damage alone": subject.damage(name).of_each()} if counts[name] else None for name in found}
    return [plan_of(subject, name, search.subsets[0], alone[name]) for name, search in found.items()]


def layer_by_layer(
    subject: Subject,
    batches: Sequence[Batch],
    counts: Mapping[str, int],
    enumerable: int = 5000,
    genetic: Genetic | None = None,
) -> list[LayerPlan]:
    """NAEE, progressively: as `by_damage`, but the inputs of each layer are those that the layers before it leave once
    their experts are gone, and its damage is what its own removal does to its output on these. A pass over the batches
    for every layer.

    Raises: as `searched`.
    """
    gone: dict[str, Subset] = {}
    alone: dict[str, dict[str, list[float]]] = {}
    with ExitStack() as removed_before:
        for name, layer in subject.layers.items():
            if not counts[name]:
                gone[name] = ()
                continue
            inputs = sampled_inputs(subject.model, batches, name, subject.collected.ask)
            damage = Damage(layer, inputs.to(next(layer.parameters()).device))
            gone[name] = _found(subject, name, counts[name], damage, 1, enumerable, genetic).subsets[0]
            alone[name] = {"damage alone": damage.of_each()}
            removed_before.enter_context(without(layer, gone[name]))
    return [plan_of(subject, name, subset, alone.get(name)) for name, subset in gone.items()]


def with_skipping(subject: Subject, plans: Sequence[LayerPlan]) -> list[LayerPlan]:
    """NAEE's dynamic skipping on top of any plan: beta of every layer is the median of second gate over first, of the
    layer as it is planned, on the sampled tokens.

    Raises: ValueError for layers whose router is not top-k.
    """
    numbers = {layer_number(name): name for name in subject.layers}
    return [replace(plan, skip_below=_threshold(subject, numbers[plan.layer], plan)) for plan in plans]


@torch.no_grad()
def _threshold(subject: Subject, name: str, plan: LayerPlan) -> float:
    layer, damage = subject.layers[name], subject.damage(name)
    with without(layer, removed(plan.keep, plan.n_experts)):
        routing = layer.router(damage.x)
    if getattr(routing, "fixed", None) is None:
        raise ValueError(f"{name}: dynamic skipping is for routers that give every token as many experts")
    # a median of 1 would skip every token's second expert but for ties
    return min(skip_threshold(routing.weight.view(len(damage.x), -1)), 1 - 2**-20)

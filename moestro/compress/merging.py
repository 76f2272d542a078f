"""Methods that make one expert of several: which are alike, and how they become one (diversified pruning,
arXiv:2407.09590; HC-SMoE, arXiv:2410.08589)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from moestro.compress.budget import share_of
from moestro.compress.feed_forward import FeedForward
from moestro.compress.observed import expert_output, gates_of
from moestro.compress.partition import Groups, agglomerate, group_experts
from moestro.compress.plan import Group, LayerPlan
from moestro.compress.pruning import Subject, groups_of, plan_of
from moestro.compress.similarity import (
    UNLIKE,
    output_cka,
    output_cosine,
    output_distance,
    to_others,
    weight_cka,
    weight_cosine,
)
from moestro.compress.units import matched
from moestro.layers.moe import MoELayer

Similarity = Literal["cka-outputs", "cosine-outputs", "cosine-weights", "cka-weights", "mean-outputs"]
Merge = Literal["uniform", "frequency", "learned", "prune"]
MERGES: tuple[str, ...] = get_args(Merge)
SIMILARITIES: tuple[str, ...] = ("cka-outputs", "cosine-outputs", "cosine-weights", "cka-weights", "mean-outputs")


@dataclass(frozen=True)
class Settings:
    """`ratio` of the experts goes, of every layer, or of all together where `everywhere`, most alike first, each layer
    keeping at least `least`. A group becomes the `merge` of its members, by equal weights, by how many tokens met them,
    or by weights learned on the sampled tokens; or its member that most tokens met stays ("prune"). `align` puts hidden
    units in the same order first. A group whose merged expert errs by more than `bound` of its members' outputs is
    refused.
    """

    ratio: float = 0.25
    similarity: Similarity = "cka-outputs"
    merge: Merge = "frequency"
    align: bool = True
    everywhere: bool = False
    least: int = 2
    largest: int | None = None
    bound: float | None = None

    def __post_init__(self) -> None:
        if self.merge not in MERGES:
            raise ValueError(f"merge={self.merge!r}, allowed: {', '.join(MERGES)}")
        if self.similarity not in SIMILARITIES or not 0 <= self.ratio < 1 or self.least < 1:
            raise ValueError(f"{self}, allowed: ratio 0 to below 1, similarity one of {', '.join(SIMILARITIES)}")


HC_SMOE = Settings(similarity="mean-outputs", merge="frequency", align=False)


@torch.no_grad()
def similarity(subject: Subject, name: str, kind: str) -> Float[Tensor, "e e"]:
    """How alike the experts of one layer are, by one of `SIMILARITIES`."""
    layer = subject.layers[name]
    if kind in ("cosine-weights", "cka-weights"):
        bank = FeedForward.of(layer)
        experts = [bank.units(e) for e in range(layer.router.n_experts)]
        return weight_cosine(experts) if kind == "cosine-weights" else weight_cka(experts, bank.d_model)
    if kind == "mean-outputs":
        seen = subject.seen(name)
        return output_distance(seen.outputs / seen.tokens)
    outputs = all_outputs(layer, sample_of(subject, name))
    return output_cka(outputs) if kind == "cka-outputs" else output_cosine(outputs)


def sample_of(subject: Subject, name: str) -> Float[Tensor, "n d"]:
    """The sampled tokens as they enter a layer.

    Raises: ValueError where none were sampled.
    """
    inputs = subject.seen(name).inputs
    if inputs is None:
        raise ValueError(f"{name}: no tokens were sampled (sample=0)")
    return inputs.to(next(subject.layers[name].parameters()).device)


@torch.no_grad()
def all_outputs(layer: MoELayer, x: Float[Tensor, "n d"]) -> Float[Tensor, "e n d"]:
    """What every expert answers to every token, gates left out."""
    return torch.stack([expert_output(layer, e, x) for e in range(layer.router.n_experts)])


def grouped(subject: Subject, settings: Settings, alike: Mapping[str, Float[Tensor, "e e"]]) -> dict[str, Groups]:
    """The groups of every layer, from how alike its experts are; of a router that ranks groups of experts inside each
    of these, as many in each.

    Raises: ValueError for a share that such routers' groups cannot lose equally, or layers are to lose differently.
    """
    if settings.everywhere:
        ranked = [name for name, layer in subject.layers.items() if groups_of(layer) > 1]
        if ranked:
            raise ValueError(f"{', '.join(ranked)}: routers rank groups of experts, which must lose equally many")
        total = sum(map(len, alike.values()))
        left = agglomerate(
            list(alike.values()), total - share_of(settings.ratio, total), settings.largest, settings.least
        )
        return dict(zip(alike, left, strict=True))
    return {name: _inside(values, groups_of(subject.layers[name]), settings) for name, values in alike.items()}


def _inside(alike: Float[Tensor, "e e"], ranked: int, settings: Settings) -> Groups:
    """The groups of one layer whose router ranks so many groups of consecutive experts (1: it ranks none)."""
    removed, size = share_of(settings.ratio, len(alike)), len(alike) // ranked
    if removed % ranked:
        raise ValueError(f"{removed} of {len(alike)} experts, allowed: equally many of {ranked} routing groups")
    found: Groups = []
    for first in range(0, len(alike), size):
        part, left = alike[first : first + size, first : first + size], size - removed // ranked
        # average linkage is what HC-SMoE is, however few the experts
        linked = settings.similarity == "mean-outputs"
        groups = (
            agglomerate([part], left, settings.largest)[0] if linked else group_experts(part, left, settings.largest)
        )
        found += [tuple(first + expert for expert in group) for group in groups]
    return found


def merge_plans(subject: Subject, settings: Settings) -> list[LayerPlan]:
    """Diversified pruning and HC-SMoE: groups of experts that are alike, one expert for each. Scores of every expert
    are its mean similarity to the others ("similarity") and, where tokens were sampled, the `merge_error` of its group.

    Raises: ValueError for a group whose merged expert errs by more than the bound.
    """
    alike = {name: similarity(subject, name, settings.similarity) for name in subject.layers}
    groups = grouped(subject, settings, alike)
    return [_plan(subject, name, groups[name], alike[name], settings) for name in subject.layers]


def warnings(plans: Sequence[LayerPlan], kind: str) -> list[str]:
    """A line for every layer whose experts are hardly alike, where similarities are at most 1: merging such experts was
    worse than removing some."""
    if kind == "mean-outputs":
        return []
    means = {plan.layer: fmean(plan.scores["similarity"]) for plan in plans}
    return [
        f"layer {layer}: mean similarity of experts {mean:.2f}, below {UNLIKE}: merging experts that are not alike "
        "tends to cost more than removing some"
        for layer, mean in means.items()
        if mean < UNLIKE
    ]


def _plan(subject: Subject, name: str, parts: Groups, alike: Float[Tensor, "e e"], settings: Settings) -> LayerPlan:
    rows, layer = subject.seen(name).rows.tolist(), subject.layers[name]
    groups = {max(members, key=lambda member: (rows[member], -member)): members for members in parts}
    made = {kept: _group(subject, name, groups[kept], kept, settings) for kept in sorted(groups)}
    scores = {"similarity": to_others(alike)}
    if settings.bound is not None or subject.seen(name).inputs is not None:
        x = sample_of(subject, name)
        errors = {g.members: merge_error(layer, g, kept, x) if g.weights != (1.0,) else 0.0 for kept, g in made.items()}
        for members, error in errors.items():
            if settings.bound is not None and error > settings.bound:
                raise ValueError(f"{name}: merging {list(members)} errs by {error:.2f}, allowed: {settings.bound}")
        scores["merge error"] = [
            errors[members] for expert in range(len(rows)) for members in errors if expert in members
        ]
    gone = [expert for expert in range(len(rows)) if expert not in made]
    plan = plan_of(subject, name, gone, scores)
    return replace(plan, groups=tuple(made.values())) if gone else plan


def _group(subject: Subject, name: str, members: Sequence[int], kept: int, settings: Settings) -> Group:
    """What becomes of one group."""
    if settings.merge == "prune":
        return Group(tuple(members), tuple(float(member == kept) for member in members))
    return Group(tuple(members), group_weights(subject, name, members, kept, settings), settings.align)


def group_weights(
    subject: Subject, name: str, members: Sequence[int], kept: int, settings: Settings
) -> tuple[float, ...]:
    """What each member counts, together 1."""
    if len(members) == 1:
        return (1.0,)
    if settings.merge == "learned":
        return learned(subject.layers[name], members, kept, sample_of(subject, name), settings.align)
    rows = subject.seen(name).rows[list(members)]
    if settings.merge == "uniform" or float(rows.sum()) == 0:
        return (1 / len(members),) * len(members)
    return tuple((rows / rows.sum()).tolist())


class _Mixed:
    """The sum of aligned units by weights, as one expert."""

    def __init__(self, layer: MoELayer, members: Sequence[int], kept: int, align: bool) -> None:
        self.bank = FeedForward.of(layer)
        units = [self.bank.units(member) for member in members]
        reference = units[members.index(kept)]
        self.units = torch.stack([u[matched(reference, u)] if align and u is not reference else u for u in units])

    def __call__(self, weights: Float[Tensor, "g"], x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        units = torch.einsum("g,gwf->wf", weights.to(self.units), self.units)
        return self.bank.run(units, x)


def _target(layer: MoELayer, members: Sequence[int], x: Tensor) -> tuple[Tensor, Tensor]:
    """Of the tokens that chose a member: their gates of all members together, and what the members added for them."""
    with torch.no_grad():
        gates = gates_of(layer.router(x))[0][:, list(members)].to(x.dtype)
        answers = torch.stack([expert_output(layer, member, x) for member in members], 1)
    return gates.sum(1, keepdim=True), torch.einsum("ng,ngd->nd", gates, answers)


def merge_error(layer: MoELayer, group: Group, kept: int, x: Float[Tensor, "n d"]) -> float:
    """||sum_i g_i f_i(x) - (sum_i g_i) merged(x)|| over ||sum_i g_i f_i(x)||, i the members, over the tokens."""
    gates, target = _target(layer, group.members, x)
    with torch.no_grad():
        mixed = _Mixed(layer, group.members, kept, group.align)(torch.tensor(group.weights), x)
    return float((gates * mixed - target).norm() / target.norm().clamp(min=torch.finfo(x.dtype).tiny))


def learned(
    layer: MoELayer, members: Sequence[int], kept: int, x: Float[Tensor, "n d"], align: bool, steps: int = 50
) -> tuple[float, ...]:
    """Weights, positive and together 1, of the least merge error that Adam finds from equal ones: the best of all that
    it passed, equal ones included, so never worse than they are."""
    gates, target = _target(layer, members, x)
    mixed = _Mixed(layer, members, kept, align)
    logits = torch.zeros(len(members), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    best = (float("inf"), (1 / len(members),) * len(members))
    for _ in range(steps):
        weights = logits.softmax(0)
        error = (gates * mixed(weights, x) - target).square().sum()
        if error.item() < best[0]:
            best = (error.item(), tuple(weights.tolist()))
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    return best[1]

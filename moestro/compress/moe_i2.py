"""MoE-I2 (arXiv:2411.01016): how many experts each layer gives up, which ones, and the ranks of those that stay."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from moestro.compress.applied import applied, layer_number
from moestro.compress.blocks import blocks_of, refine
from moestro.compress.budget import removed_counts, share_of
from moestro.compress.calibration import calibrate
from moestro.compress.feed_forward import FeedForward
from moestro.compress.lowrank import allocate_ranks, rank_keeping
from moestro.compress.masking import without
from moestro.compress.plan import LayerPlan
from moestro.compress.pruning import Subject, groups_of, most_removed, plan_of, searched, uniform
from moestro.compress.search import Genetic
from moestro.data import Batch
from moestro.evaluate.perplexity import evaluate


@dataclass(frozen=True)
class Settings:
    """`ratio` of all experts goes, by layer `counts`: fewer from important layers, or as many of each. `importance` is
    what experts are missed by: the output of their layer, or the loss on the text. Of every layer the `candidates` best
    sets are kept; layers of a block of `block` choose among theirs together. `fraction` of every remaining expert's
    parameters stays on average in low-rank factors, None to leave matrices whole; no rank falls below `lowest` of that.
    """

    ratio: float = 0.25
    counts: Literal["importance", "uniform"] = "importance"
    importance: Literal["recon", "loss"] = "recon"
    temperature: float = 1.0
    candidates: int = 3
    block: int = 3
    propagate: bool = False
    enumerable: int = 5000
    genetic: Genetic = Genetic()
    fraction: float | None = None
    lowest: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1 or self.candidates < 1 or not 0 < self.lowest <= 1:
            raise ValueError(f"{self}, allowed: ratio 0 to below 1, candidates from 1, lowest above 0 to 1")
        for name, allowed in {"counts": ("importance", "uniform"), "importance": ("recon", "loss")}.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}, allowed: {', '.join(allowed)}")
        if self.block < 1 or not self.temperature > 0:
            raise ValueError(f"block={self.block}, temperature={self.temperature}, allowed: from 1, above 0")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ValueError(f"fraction={self.fraction}, allowed: above 0 to 1, or None")


def importance(subject: Subject, batches: Sequence[Batch], kind: str) -> dict[str, list[float]]:
    """e_lj: what removing each expert alone costs, in the layer's output ("recon") or in nats a token ("loss", 0 where
    the loss falls: one pass over the text for every expert)."""
    if kind == "recon":
        return {name: subject.damage(name).of_each() for name in subject.layers}
    before = evaluate(subject.model, batches)["loss"]
    found = {}
    for name, layer in subject.layers.items():
        found[name] = []
        for expert in range(layer.router.n_experts):
            with without(layer, [expert]):
                found[name].append(max(0.0, evaluate(subject.model, batches)["loss"] - before))
    return found


def counts_of(subject: Subject, missed: Mapping[str, Sequence[float]], settings: Settings) -> dict[str, int]:
    """Experts to remove of every layer: round(ratio * all experts) together, by the sums of the experts' importance.

    Raises: ValueError for routers that rank groups of experts: their groups must stay equal, which no single expert
    can."""
    if settings.counts == "uniform":
        return uniform(subject, settings.ratio)
    layers = subject.layers
    grouped = [name for name, layer in layers.items() if groups_of(layer) > 1]
    if grouped:
        raise ValueError(f"{', '.join(grouped)}: routers rank groups of experts; take counts='uniform'")
    total = share_of(settings.ratio, sum(layer.router.n_experts for layer in layers.values()))
    most = [most_removed(layer) for layer in layers.values()]
    each = removed_counts([sum(missed[name]) for name in layers], most, total, settings.temperature)
    return dict(zip(layers, each, strict=True))


def moe_i2(subject: Subject, batches: Sequence[Batch], settings: Settings) -> list[LayerPlan]:
    """Stages 1 and 2; the third, healing, is `moestro.compress.healing`. `batches` are the calibration text, or a part
    of it, which blocks of decoder layers run on. With ratio 0 nothing is searched."""
    missed = importance(subject, batches, settings.importance) if settings.ratio else {}
    counts = counts_of(subject, missed, settings) if settings.ratio else dict.fromkeys(subject.layers, 0)
    found = searched(subject, counts, settings.candidates, settings.enumerable, settings.genetic)
    candidates = {name: search.subsets for name, search in found.items()}
    if any(len(subsets) > 1 for subsets in candidates.values()):
        blocks = blocks_of(subject.model, batches, settings.block)
        chosen = refine(subject.model, blocks, candidates, settings.propagate)
    else:
        chosen = {name: subsets[0] for name, subsets in candidates.items()}
    alone = {name: {"damage alone": values} for name, values in missed.items()}
    plans = [plan_of(subject, name, gone, alone.get(name)) for name, gone in chosen.items()]
    return plans if settings.fraction is None else with_ranks(subject.model, batches, plans, settings, subject)


def with_ranks(
    model: nn.Module, batches: Iterable[Batch], plans: Sequence[LayerPlan], settings: Settings, subject: Subject
) -> list[LayerPlan]:
    """The plans with a rank for every expert that stays, in proportion to what it is missed by in the pruned model,
    where inputs are those that the layers before leave."""
    pruned = applied(model, plans)
    again = Subject(pruned, calibrate(pruned, batches, replace(subject.collected.ask, moments=False, everywhere=False)))
    return [replace(plan, ranks=_ranks(again, plan, settings)) for plan in plans]


def _ranks(pruned: Subject, plan: LayerPlan, settings: Settings) -> tuple[int, ...]:
    name = next(name for name in pruned.layers if layer_number(name) == plan.layer)
    bank = FeedForward.of(pruned.layers[name])
    if len(set(bank.widths)) > 1:
        raise ValueError(f"{name}: experts of widths {bank.widths}; ranks are shared among experts of one width")
    d_model, width = bank.d_model, bank.widths[0]
    mean = rank_keeping(settings.fraction or 1.0, d_model, width)
    # above the rank at which factors have as many parameters as the matrix there is nothing to gain
    highest = rank_keeping(1.0, d_model, width)
    return tuple(allocate_ranks(pruned.damage(name).of_each(), mean, max(1, int(settings.lowest * mean)), highest))

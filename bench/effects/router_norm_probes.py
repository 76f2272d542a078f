"""What the study of provable pruning asks of a fine-tuned run: perplexity after experts went by their routers."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from statistics import fmean
from typing import Any

from torch import Tensor

from bench.effects.compression_probes import HELD_OUT, Ways, train_on
from bench.effects.study import Trained
from moestro.compress.applied import applied, kept, layer_number
from moestro.compress.plan import LayerPlan
from moestro.compress.pruning import by_damage, by_scores, uniform
from moestro.compress.router_norms import kept_by_change, router_norm_changes
from moestro.compress.source import RunSource

# Of 8 experts a layer.
RATIOS = {"2 of 8": 0.25, "4 of 8": 0.5, "6 of 8": 0.75}
DRAWS, STEPS = 8, 50


def by_router_norms(trained: Trained) -> dict[str, float]:
    """{way: perplexity on held-out text} of the tuned model, its own under "whole"; "untuned" is the model that it
    started from, on the same text."""
    before, after = RunSource(trained.recipe.adapt.build().start), RunSource(trained.folder)
    change = router_norm_changes(before, after)
    tuned, untuned = Pruned(trained, None), Pruned(trained, 0)
    found = {"whole": tuned.whole(), "untuned, whole": untuned.whole()}
    moved = distances(before, after)
    for label, ratio in RATIOS.items():
        orders = {"change": change, "reverse": {layer: -of for layer, of in change.items()}, "norm of change": moved}
        plans = {way: tuned.by(order, ratio) for way, order in orders.items()}
        costs = {way: tuned.ways.of(plan) for way, plan in plans.items()}
        costs |= {f"{way}, zeroed": tuned.ways.of(plans[way], "zero") for way in ("change", "reverse")}
        costs |= {"random": tuned.random(ratio), "random, zeroed": tuned.random(ratio, "zero"), **tuned.by_text(ratio)}
        costs |= {"untuned, change": untuned.ways.of(plans["change"]), "untuned, random": untuned.random(ratio)}
        costs["change, trained on"] = tuned.trained_on(plans["change"])
        found |= {f"{way}, {label}": value for way, value in costs.items()}
    return found | {"whole, trained on": tuned.trained_on(())}


def distances(before: RunSource, after: RunSource) -> dict[int, Tensor]:
    """The norm of the change of every router row, by layer: what the signed change of norms is easily taken for."""
    names = {layer: after.router_tensors(layer)["weight"] for layer in after.moe_layers}
    return {
        layer: (after.read(name).double() - before.read(name).double()).norm(dim=1) for layer, name in names.items()
    }


class Pruned:
    """One model, that of a step of a run (None: the last), without some of its experts."""

    def __init__(self, trained: Trained, step: int | None) -> None:
        self.trained, self.ways = trained, Ways(trained.model(step), trained)

    def whole(self) -> float:
        """Perplexity with all experts."""
        return self.ways.perplexity(self.ways.model)

    def by(self, order: Mapping[int, Tensor], ratio: float) -> list[LayerPlan]:
        """The experts that stand highest in an order stay, as many of each layer."""
        counts = uniform(self.ways.subject, ratio)
        return [
            kept(name, len(scores), kept_by_change(scores, len(scores) - counts[name]))
            for name in counts
            for scores in (order[layer_number(name)],)
        ]

    def random(self, ratio: float, semantics: Any = "slice") -> float:
        """Mean perplexity over sets of experts that are drawn."""
        subject = self.ways.subject
        draws = [replace(subject, seed=1000 * draw + subject.seed) for draw in range(DRAWS)]
        counts = uniform(subject, ratio)
        return fmean(self.ways.of(by_scores(draw, "random", counts), semantics) for draw in draws)

    def by_text(self, ratio: float) -> dict[str, float]:
        """Criteria that look at text: that which the model is tuned on."""
        subject, counts = self.ways.subject, uniform(self.ways.subject, ratio)
        found = {name: self.ways.of(by_scores(subject, name, counts)) for name in ("frequency", "reap")}
        return found | {"recon": self.ways.of(by_damage(subject, counts))}

    def trained_on(self, plans: Any) -> float:
        """Perplexity after all weights were trained on with the tuning text."""
        model = applied(self.ways.model, plans) if plans else copy.deepcopy(self.ways.model)
        train_on(model, self.trained, STEPS if self.trained.final_tokens > HELD_OUT else 3)
        return self.ways.perplexity(model.eval())

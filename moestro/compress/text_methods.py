"""How every method that looks at text makes its plans, under the names that the command line has for them."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from moestro.compress.choosing import chosen_by_measuring
from moestro.compress.merging import HC_SMOE, merge_plans
from moestro.compress.merging import Settings as Merging
from moestro.compress.merging import warnings as unlike
from moestro.compress.methods import Request
from moestro.compress.moe_i2 import Settings, moe_i2
from moestro.compress.plan import LayerPlan, PlanError
from moestro.compress.pruning import Subject, by_damage, by_scores, layer_by_layer, most_removed
from moestro.compress.search import Genetic
from moestro.data import Batch

SEARCH: dict[str, Any] = {"enumerable": 5000, "population": 100, "generations": 50}
# Options of low ranks: the share of every expert's parameters that stays, 0 for whole matrices.
RANKS: dict[str, Any] = {"fraction": 0.0, "lowest": 0.5, "whiten": False}


@dataclass(frozen=True)
class Asked:
    """What a method knows: the calibrated model, text that calibration did not see (for methods that choose by it), how
    many experts go of every layer, the text, and what `Method.settings` made of the request."""

    subject: Subject
    held_out: list[Batch]
    counts: Mapping[str, int]
    batches: list[Batch]
    request: Request
    settings: Any


Make = Callable[[Asked], list[LayerPlan]]
Options = Mapping[str, Any]


@dataclass(frozen=True)
class Method:
    """How plans are made, the options with their defaults, what these and a request come to (before anything is
    measured), whether all experts must see all tokens, and whether every fourth batch of the text is held out to choose
    by."""

    make: Make
    options: Options
    settings: Callable[[Request, Options], Any] = lambda request, options: None
    everywhere: bool = False
    holds_out: bool = False

    def settled(self, request: Request, options: Options) -> Any:
        """Raises: PlanError for options that say nothing possible."""
        try:
            return self.settings(request, options)
        except PlanError:
            raise
        except ValueError as error:
            raise PlanError(f"{request.method}: {error}") from error


def _some(options: Options, *names: str) -> dict[str, Any]:
    return {name: options[name] for name in names}


def _genetic(options: Options) -> Genetic:
    return Genetic(options["population"], options["generations"])


@dataclass(frozen=True)
class Recon:
    """How sets of experts are searched for; `genetic` where not every one can be looked at and that is allowed."""

    enumerable: int
    genetic: Genetic | None
    progressive: bool


def _recon_settings(request: Request, options: Options) -> Recon:
    genetic = _genetic(options) if options["genetic"] else None
    return Recon(options["enumerable"], genetic, options["progressive"])


def _recon(asked: Asked) -> list[LayerPlan]:
    how = asked.counts, asked.settings.enumerable, asked.settings.genetic
    if asked.settings.progressive:
        return layer_by_layer(asked.subject, asked.batches, *how)
    return by_damage(asked.subject, *how)


def _moe_i2_settings(request: Request, options: Options) -> Settings:
    return Settings(
        ratio=request.ratio,
        counts="importance" if request.per_layer else "uniform",
        genetic=_genetic(options),
        fraction=options["fraction"] or None,
        **_some(options, "importance", "temperature", "candidates", "block", "propagate", "enumerable", "lowest"),
    )


def _svd_settings(request: Request, options: Options) -> Settings:
    if request.ratio or not options["fraction"]:
        raise PlanError("svd removes no experts: ratio 0, and --option fraction=F, the share of parameters that stays")
    return Settings(ratio=0.0, **_some(options, "fraction", "lowest"))


def _moe_i2(asked: Asked) -> list[LayerPlan]:
    return moe_i2(asked.subject, asked.batches, asked.settings)


def _merge_settings(request: Request, options: Options) -> Merging:
    how = _some(options, "similarity", "merge", "align")
    return Merging(request.ratio, everywhere=request.per_layer, bound=options["bound"] or None, **how)


def _hc_smoe_settings(request: Request, options: Options) -> Merging:
    return replace(HC_SMOE, ratio=request.ratio, everywhere=request.per_layer)


def _merge(asked: Asked) -> list[LayerPlan]:
    settings = asked.settings
    if asked.request.semantics == "slice":
        # a token must find as many experts as it takes, whatever the similarity says
        fewest = max(layer.router.n_experts - most_removed(layer) for layer in asked.subject.layers.values())
        settings = replace(settings, least=fewest)
    plans = merge_plans(asked.subject, settings)
    for line in unlike(plans, settings.similarity):
        warnings.warn(line, stacklevel=2)
    return plans


def _auto_settings(request: Request, options: Options) -> dict[str, Any]:
    """{criterion: its settings, all options at their defaults}."""
    allowed = [name for name in METHODS if name != "auto"]
    criteria = [name.strip() for name in options["criteria"].split(",")]
    if not set(criteria) <= set(allowed):
        raise PlanError(f"criteria={options['criteria']!r}, allowed: {', '.join(allowed)}")
    return {name: METHODS[name].settings(request, METHODS[name].options) for name in criteria}


def _auto(asked: Asked) -> list[LayerPlan]:
    plans = {
        name: partial(METHODS[name].make, replace(asked, settings=settings))
        for name, settings in asked.settings.items()
    }
    return chosen_by_measuring(asked.subject.model, plans, asked.held_out, asked.request.semantics)


def _scored(criterion: str) -> Method:
    return Method(lambda asked: by_scores(asked.subject, criterion, asked.counts), {})


MOE_I2: Options = {
    **SEARCH,
    **RANKS,
    **{"importance": "recon", "temperature": 1.0, "candidates": 3, "block": 3, "propagate": False},
}
MERGE: Options = {"similarity": "cka-outputs", "merge": "frequency", "align": True, "bound": 0.0}
METHODS: dict[str, Method] = {
    **{criterion: _scored(criterion) for criterion in ("frequency", "gate-sum", "man", "reap", "random")},
    "recon": Method(_recon, {**SEARCH, "genetic": False, "progressive": False}, _recon_settings),
    "moe-i2": Method(_moe_i2, MOE_I2, _moe_i2_settings),
    "svd": Method(_moe_i2, {**RANKS, "fraction": 0.5}, _svd_settings),
    "merge": Method(_merge, MERGE, _merge_settings),
    "hc-smoe": Method(_merge, {}, _hc_smoe_settings, everywhere=True),
    "auto": Method(_auto, {"criteria": "frequency,reap,recon"}, _auto_settings, everywhere=True, holds_out=True),
}

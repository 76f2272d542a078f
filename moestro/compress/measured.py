"""Methods that look at text: a folder is loaded as a model of ours, calibrated on the text, and planned for."""

import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from moestro.compress.applied import layer_number
from moestro.compress.calibration import Ask, Collected, calibrate
from moestro.compress.choosing import chosen_by_measuring
from moestro.compress.feasible import Wanted, check_method
from moestro.compress.fingerprint import fingerprint
from moestro.compress.merging import HC_SMOE, merge_plans
from moestro.compress.merging import Settings as Merging
from moestro.compress.merging import warnings as unlike
from moestro.compress.methods import Request, checked, option, versions
from moestro.compress.moe_i2 import Settings, moe_i2
from moestro.compress.plan import LayerPlan, Plan, PlanError, Quantisation, TensorFile, rows_of
from moestro.compress.pruning import Subject, by_damage, by_scores, layer_by_layer, most_removed, with_skipping
from moestro.compress.search import Genetic
from moestro.compress.source import RunSource, open_source
from moestro.compress.storing import require_storable
from moestro.compress.text import batches_of
from moestro.data import Batch
from moestro.data.cache import digest
from moestro.formats import Checkpoint
from moestro.formats.writer import write_tensors

CALIBRATION, MOMENTS = "calibration", "moments.safetensors"
# What every method takes besides its own options.
SHARED: dict[str, Any] = {"sample": 1024, "skip": False, "quantise": "", "group_size": 0, "calibrated": False}
SEARCH: dict[str, Any] = {"enumerable": 5000, "genetic": False, "population": 100, "generations": 50}
# Options of low ranks: the share of every expert's parameters that stays, 0 for whole matrices.
RANKS: dict[str, Any] = {"fraction": 0.0, "lowest": 0.5, "whiten": False}


@dataclass(frozen=True)
class Asked:
    """What a method knows: the calibrated model, text that calibration did not see (for methods that choose by it), how
    many experts go of every layer, the text, its options."""

    subject: Subject
    held_out: list[Batch]
    counts: Mapping[str, int]
    batches: list[Batch]
    request: Request
    options: Mapping[str, Any]

    def genetic(self) -> Genetic | None:
        """The search that is allowed where not every set can be looked at."""
        asked = self.options
        return Genetic(asked["population"], asked["generations"]) if asked["genetic"] else None

    def prefixed(self, *names: str) -> dict[str, Any]:
        """Some of the options."""
        return {name: self.options[name] for name in names}


Make = Callable[[Asked], list[LayerPlan]]


@dataclass(frozen=True)
class Method:
    """How plans are made, its options with their defaults, whether all experts must see all tokens, and whether every
    fourth batch of the text is held out to choose by."""

    make: Make
    options: Mapping[str, Any]
    everywhere: bool = False
    holds_out: bool = False


def _recon(asked: Asked) -> list[LayerPlan]:
    how = asked.counts, asked.options["enumerable"], asked.genetic()
    if asked.options["progressive"]:
        return layer_by_layer(asked.subject, asked.batches, *how)
    return by_damage(asked.subject, *how)


def _moe_i2(asked: Asked) -> list[LayerPlan]:
    options = asked.options
    settings = Settings(
        ratio=asked.request.ratio,
        counts="importance" if asked.request.per_layer else "uniform",
        genetic=Genetic(options["population"], options["generations"]),
        fraction=options["fraction"] or None,
        **asked.prefixed("importance", "temperature", "candidates", "block", "propagate", "enumerable", "lowest"),
    )
    return moe_i2(asked.subject, asked.batches, settings)


def _svd(asked: Asked) -> list[LayerPlan]:
    if asked.request.ratio or not 0 < asked.options["fraction"] <= 1:
        raise PlanError("svd removes no experts: ratio 0, and --option fraction=F, the share of parameters that stays")
    settings = Settings(ratio=0.0, fraction=asked.options["fraction"], lowest=asked.options["lowest"])
    return moe_i2(asked.subject, asked.batches, settings)


def _merge(asked: Asked, hc_smoe: bool = False) -> list[LayerPlan]:
    settings = HC_SMOE if hc_smoe else Merging(**asked.prefixed("similarity", "merge", "align"))
    bound = None if hc_smoe else asked.options["bound"] or None
    if asked.request.semantics == "slice":
        # a token must find as many experts as it takes, whatever the similarity says
        fewest = max(layer.router.n_experts - most_removed(layer) for layer in asked.subject.layers.values())
        settings = replace(settings, least=fewest)
    settings = replace(settings, ratio=asked.request.ratio, everywhere=asked.request.per_layer, bound=bound)
    plans = merge_plans(asked.subject, settings)
    for line in unlike(plans, settings.similarity):
        warnings.warn(line, stacklevel=2)
    return plans


def _auto(asked: Asked) -> list[LayerPlan]:
    criteria = [name.strip() for name in asked.options["criteria"].split(",")]
    unknown = [name for name in criteria if name not in METHODS or name == "auto"]
    if unknown:
        raise PlanError(f"criteria={asked.options['criteria']!r}, allowed: {', '.join(set(METHODS) - {'auto'})}")
    ways = {name: replace(asked, options={**SHARED, **METHODS[name].options}) for name in criteria}
    plans = {name: partial(METHODS[name].make, way) for name, way in ways.items()}
    return chosen_by_measuring(asked.subject.model, plans, asked.held_out, asked.request.semantics)


def _scored(criterion: str) -> Method:
    return Method(lambda asked: by_scores(asked.subject, criterion, asked.counts), {})


METHODS: dict[str, Method] = {
    **{criterion: _scored(criterion) for criterion in ("frequency", "gate-sum", "man", "reap", "random")},
    "recon": Method(_recon, {**SEARCH, "progressive": False}),
    "moe-i2": Method(
        _moe_i2,
        {
            **SEARCH,
            **RANKS,
            "importance": "recon",
            "temperature": 1.0,
            "candidates": 3,
            "block": 3,
            "propagate": False,
        },
    ),
    "svd": Method(_svd, {**RANKS, "fraction": 0.5}),
    "merge": Method(_merge, {"similarity": "cka-outputs", "merge": "frequency", "align": True, "bound": 0.0}),
    "hc-smoe": Method(partial(_merge, hc_smoe=True), {}, everywhere=True),
    "auto": Method(_auto, {"criteria": "frequency,reap,recon"}, everywhere=True, holds_out=True),
}


def plan_by_measuring(request: Request) -> Plan:
    """The plan of any method of this file.

    Raises: PlanError for options that the method does not have, or no text.
    """
    method = METHODS[request.method]
    options = option(request, {**SHARED, **method.options})
    checkpoint, _, kept = checked(request)
    how = _quantisation(checkpoint, options)
    check_method(checkpoint, request.output, request.per_layer, wanted(request, options))
    moments = options["calibrated"] or options.get("whiten", False)
    ask = Ask(options["sample"], method.everywhere, moments, request.seed)
    batches = batches_of(request)
    held_out = batches[3::4] if method.holds_out else []
    batches = [batch for place, batch in enumerate(batches) if not (method.holds_out and place % 4 == 3)]
    if method.holds_out and not held_out:
        raise PlanError(f"{request.method}: the text has {len(batches)} batches, too few to hold one out: more tokens")
    model = loaded(request)
    # an interrupted pass is found again by what was asked, whatever method asked it
    asked = digest(vars(ask), str(request.source.resolve()), request.text, request.tokens, request.seq_len)
    keep = None if request.folder is None else request.folder / f"{CALIBRATION}-{asked[:12]}"
    collected = calibrate(model, batches, ask, keep)
    for line in collected.warnings():
        warnings.warn(line, stacklevel=2)
    subject = Subject(model, collected, request.seed)
    counts = {name: seen.n_experts - kept[layer_number(name)] for name, seen in collected.layers.items()}
    try:
        layers = method.make(Asked(subject, held_out, counts, batches, request, options))
    except ValueError as error:
        raise PlanError(f"{request.method}: {error}") from error
    if options["skip"]:
        layers = with_skipping(subject, layers)
    if keep is not None:
        shutil.rmtree(keep)
    return _plan(request, checkpoint, layers, options, collected, how)


def wanted(request: Request, options: Mapping[str, Any]) -> Wanted:
    """What the plan will do to experts that stay, known before anything is measured."""
    return Wanted(
        factors=request.method == "svd" or bool(options.get("fraction")),
        merges=request.method in ("merge", "hc-smoe") and request.ratio > 0,
        skips=options["skip"],
        whitens=options.get("whiten", False),
        quantises=bool(options["quantise"]),
    )


def _quantisation(source: Checkpoint | RunSource, options: Mapping[str, Any]) -> Quantisation | None:
    """How experts are to be stored, known to be possible before anything is measured.

    Raises: PlanError.
    """
    if not options["quantise"]:
        if options["calibrated"] or options["group_size"]:
            raise PlanError("calibrated and group_size say how experts are quantised: give quantise=int8, int4 or fp8")
        return None
    how = Quantisation(options["quantise"], options["group_size"], options["calibrated"])
    if isinstance(source, RunSource):
        raise PlanError(
            "quantise: a run's experts keep their dtype; export it as a stock architecture, then compress that"
        )
    require_storable(how, source)
    return how


def loaded(request: Request) -> nn.Module:
    """The source as a decoder of ours: a run's own, or one with every mixture over the folder's own tensors."""
    source = open_source(request.source)
    if isinstance(source, RunSource):
        return source.loaded().to(request.device).eval()
    from moestro.hf import Hosted, load

    return Hosted(load(request.source, device=request.device)).eval()


def _plan(
    request: Request,
    checkpoint: Checkpoint | RunSource,
    layers: list[LayerPlan],
    options: dict[str, Any],
    collected: Collected,
    how: Quantisation | None,
) -> Plan:
    wanted = options["calibrated"] or options.get("whiten", False)
    return Plan(
        request.method,
        request.ratio,
        fingerprint(checkpoint),
        tuple(layers),
        request.semantics,
        merged_rows=rows_of(layers),
        quantise=how,
        tensors=moments_file(collected, layers, request.folder) if wanted else None,
        options=options,
        seed=request.seed,
        calibration=collected.source(str(request.text)),
        versions=versions(),
    )


def moments_file(collected: Collected, layers: list[LayerPlan], folder: Path | None) -> TensorFile:
    """Second moments of the inputs of the kept experts' matrices, in a file beside the plan.

    Raises: PlanError where the plan has no folder.
    """
    if folder is None:
        raise PlanError("moments of the experts' inputs lie beside the plan: there is no folder for it")
    seen = {layer_number(name): found for name, found in collected.layers.items()}
    tensors: dict[str, Tensor] = {}
    for layer in layers:
        for old in layer.keep:
            rows = max(1.0, float(seen[layer.layer].rows[old]))
            for side in ("input", "hidden"):
                value = seen[layer.layer].sums[f"{side}_moments_{old}"] / rows
                tensors[f"moments.{layer.layer}.{old}.{side}"] = value.float().contiguous()
    return TensorFile(MOMENTS, write_tensors(folder / MOMENTS, tensors))

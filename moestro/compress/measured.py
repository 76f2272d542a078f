"""Methods that look at text: a folder is loaded as a model of ours, calibrated on the text, and planned for."""

import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from moestro.compress.applied import layer_number
from moestro.compress.calibration import Ask, Collected, calibrate
from moestro.compress.feasible import Wanted, check_method
from moestro.compress.fingerprint import fingerprint
from moestro.compress.methods import Request, checked, option, versions
from moestro.compress.plan import LayerPlan, Plan, PlanError, Quantisation, TensorFile, rows_of
from moestro.compress.pruning import Subject, with_skipping
from moestro.compress.source import RunSource, open_source
from moestro.compress.storing import require_storable
from moestro.compress.text import batches_of
from moestro.compress.text_methods import METHODS, Asked
from moestro.data.cache import digest
from moestro.formats import Checkpoint
from moestro.formats.writer import write_tensors

CALIBRATION, MOMENTS = "calibration", "moments.safetensors"
# What every method takes besides its own options.
SHARED: dict[str, Any] = {"sample": 1024, "skip": False, "quantise": "", "group_size": 0, "calibrated": False}


def plan_by_measuring(request: Request) -> Plan:
    """The plan of any of `text_methods.METHODS`.

    Raises: PlanError for options that the method does not have or that say nothing possible, or no text.
    """
    method = METHODS[request.method]
    options = option(request, {**SHARED, **method.options})
    settings = method.settled(request, options)
    checkpoint, _, kept = checked(request)
    how = _quantisation(checkpoint, options)
    check_method(checkpoint, request.output, request.per_layer, wanted(request, options))
    if isinstance(checkpoint, RunSource) and checkpoint.others:
        raise PlanError(
            f"{request.method} ranks the experts of every mixture. {checkpoint.others[0]}; or method width, which "
            "leaves such layers as they are"
        )
    moments = options["calibrated"] or options.get("whiten", False)
    ask = Ask(options["sample"], method.everywhere, moments, request.seed)
    batches = batches_of(request)
    held_out = batches[3::4] if method.holds_out else []
    batches = [batch for place, batch in enumerate(batches) if not (method.holds_out and place % 4 == 3)]
    if method.holds_out and not held_out:
        raise PlanError(f"{request.method}: the text has {len(batches)} batches, too few to hold one out: more tokens")
    model = loaded(request)
    # an interrupted pass is found again by what was asked, whatever method asked it
    asked = digest(
        vars(ask), str(request.source.resolve()), request.text, request.tokens, request.seq_len, method.holds_out
    )
    keep = None if request.folder is None else request.folder / f"{CALIBRATION}-{asked[:12]}"
    collected = calibrate(model, batches, ask, keep)
    for line in collected.warnings():
        warnings.warn(line, stacklevel=2)
    subject = Subject(model, collected, request.seed)
    counts = {name: seen.n_experts - kept[layer_number(name)] for name, seen in collected.layers.items()}
    try:
        layers = method.make(Asked(subject, held_out, counts, batches, request, settings))
    except ValueError as error:
        raise PlanError(f"{request.method}: {error}") from error
    if options["skip"]:
        layers = with_skipping(subject, layers)
    if keep is not None:
        shutil.rmtree(keep)
    return _plan(request, checkpoint, layers, options, collected, how)


def wanted(request: Request, options: Mapping[str, Any]) -> Wanted:
    """What the plan will do to experts that stay, known before anything is measured."""
    # what measuring several may choose
    methods = {name.strip() for name in options.get("criteria", request.method).split(",")}
    return Wanted(
        factors="svd" in methods or bool(options.get("fraction")),
        merges=bool(methods & {"merge", "hc-smoe"}) and request.ratio > 0,
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

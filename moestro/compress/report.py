"""What a compression did, as JSON values and as a section of a model card."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moestro.compress.applying import REPORT
from moestro.compress.healed import said_of
from moestro.compress.measuring import Question, measured
from moestro.compress.plan import LayerPlan, Plan
from moestro.compress.plan_file import read_plan
from moestro.compress.quantised import quantised_share
from moestro.compress.source import RunSource, open_source
from moestro.formats import FAMILIES, Family, Fused
from moestro.model.active import total_parameters
from moestro.train.durable import write_json, write_text
from moestro.train.folder_job import read_control

# Calibration rows below which an expert's score is said to be of too little.
FEW = 100
SPEED = (
    "A token visits as many experts as before, so decoding is expected to be as fast as before; what becomes smaller "
    "is memory."
)
BEGIN, END = "<!-- moestro compress -->", "<!-- /moestro compress -->"


def reported(source: Path, destination: Path, question: Question | None) -> dict[str, Any]:
    """Everything about one compression; what needs the models run only where there is a `question`. Without one, what
    an earlier report of the same folder had measured stays in it."""
    plan = read_plan(destination / "compression_plan.json", whole=False)
    found: dict[str, Any] = {
        "source": source.name,
        "method": plan.method,
        "ratio": plan.ratio,
        "semantics": plan.semantics,
        "quantise": None if plan.quantise is None else plan.quantise.scheme,
        "calibration": None if plan.calibration is None else vars(plan.calibration),
        "seed": plan.seed,
        "versions": plan.versions,
        "layers": [_layer(layer) for layer in plan.layers],
        "warnings": warnings(plan),
        "before": sizes(source),
        "after": sizes(destination, plan),
        "decode_speed": None if any(map(_spares_work, plan.layers)) else SPEED,
    }
    if plan.quantise is not None:
        found["after"]["quantised_share"] = quantised_share(destination)
    if question is not None:
        found["before"] |= measured(source, question)
        found["after"] |= measured(destination, question, source)
    if (healing := said_of(destination, question)) is not None:
        found["healing"] = healing
    return found if question is not None else _with_earlier(found, read_control(destination / REPORT) or {})


def _with_earlier(found: dict[str, Any], earlier: Mapping[str, Any]) -> dict[str, Any]:
    """The report with the figures of an earlier one that it lacks."""
    sides = {side: {**earlier.get(side, {}), **found[side]} for side in ("before", "after")}
    without = (
        {"healing": {**found["healing"], "without": earlier["healing"]["without"]}} if "healing" in earlier else {}
    )
    return {**found, **sides, **without}


def _spares_work(layer: LayerPlan) -> bool:
    """Whether a token needs less arithmetic than before."""
    return layer.skip_below is not None or layer.narrows or layer.factors


def _layer(layer: LayerPlan) -> dict[str, Any]:
    share = None if not layer.rows or not sum(layer.rows) else [rows / sum(layer.rows) for rows in layer.rows]
    return {
        "layer": layer.layer,
        "experts": [layer.n_experts, layer.n_kept],
        "retained": list(layer.keep),
        "new_ids": list(layer.new_ids),
        "scores": layer.scores,
        "coverage": share,
        "entropy": layer.entropy,
    }


def warnings(plan: Plan, few: int = FEW) -> list[str]:
    """A line for every layer of which calibration saw experts on fewer than `few` rows."""
    lines = []
    for layer in plan.layers:
        seldom = [e for e, rows in enumerate(layer.rows or ()) if rows < few]
        if seldom:
            lines.append(
                f"layer {layer.layer}: {len(seldom)} of {layer.n_experts} experts computed fewer than {few} rows of "
                f"the calibration text ({', '.join(map(str, seldom))}): their scores say little"
            )
    return lines


def sizes(folder: Path, plan: Plan | None = None) -> dict[str, Any]:
    """Bytes on disk, parameters: all, the experts', and those that a token touches. Where `plan` quantised the experts,
    parameters are those of their matrices, however these are stored."""
    source = open_source(folder)
    if isinstance(source, RunSource):
        return _run_sizes(source)
    shards, family = source.shards, FAMILIES[source.config["model_type"]]
    experts: dict[int, int] = {}
    others = 0
    for name in shards:
        numel, layer = math.prod(shards[name].shape), _expert_layer(family, name)
        if layer is None:
            others += numel
        else:
            experts[layer] = experts.get(layer, 0) + numel
    planned = {} if plan is None else {layer.layer: layer.n_kept for layer in plan.layers}
    if plan is not None and plan.quantise is not None:
        matrix = 3 * source.config[family.width_key]
        experts = {
            layer: planned[layer] * matrix * shards[family.router.format(layer=layer)].shape[1] for layer in experts
        }
    top_k = source.config[family.top_k_key]
    counts = {layer: planned.get(layer, shards[family.router.format(layer=layer)].shape[0]) for layer in experts}
    active = others + sum(numel * min(1.0, top_k / counts[layer]) for layer, numel in experts.items())
    return {
        "disk_bytes": sum((folder / file).stat().st_size for file in shards.files),
        "parameters": _parameters(others + sum(experts.values()), sum(experts.values()), active),
    }


def _parameters(total: float, experts: float, active: float) -> dict[str, int]:
    return {"total": round(total), "experts": round(experts), "active": round(active)}


def _expert_layer(family: Family, name: str) -> int | None:
    """The layer whose expert a tensor belongs to; None for all others."""
    if isinstance(family.experts, Fused):
        numbers = re.findall(r"\.layers\.(\d+)\.", name)
        return int(numbers[0]) if numbers and name in family.experts.tensors(int(numbers[0])) else None
    stem, _, rest = name.partition(".unequal.")
    found = family.experts.member.match(f"{stem}.{rest}" if rest else name)
    return int(found["layer"]) if found else None


def _run_sizes(source: RunSource) -> dict[str, Any]:
    total = total_parameters(source.model)
    experts, active = 0.0, float(total)
    for _, layer in source.mixtures.values():
        own = float(sum(bank.own_parameters().sum() for bank in layer.banks()))  # type: ignore[union-attr]
        experts += own
        active -= own * (1 - min(1.0, layer.router.rows_per_token() / layer.router.n_experts))
    return {
        "disk_bytes": sum(path.stat().st_size for path in source.weights),
        "parameters": _parameters(total, experts, active),
    }


def write_report(found: Mapping[str, Any], destination: Path) -> Path:
    """`report.json` and a section of README.md in the compressed folder; returns the first one's path."""
    write_json(destination / REPORT, found)
    card = destination / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    write_text(card, f"{before.rstrip()}\n\n{BEGIN}\n{section(found)}{END}\n{after.lstrip()}".lstrip())
    return destination / REPORT


def section(found: Mapping[str, Any]) -> str:
    """The model card's section."""
    rows = [("", "before", "after"), ("---", "---:", "---:"), *figures(found)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    lines = [f"- {line}" for line in found["warnings"]]
    kept = [
        f"- layer {layer['layer']}: {layer['experts'][1]} of {layer['experts'][0]}: "
        f"{', '.join(map(str, layer['retained']))}"
        for layer in found["layers"]
    ]
    said = f"`moestro compress --method {found['method']} --ratio {found['ratio']:g}`, semantics {found['semantics']}"
    parts = ["## Compression", "", f"{said}, from {found['source']}.", "", table, ""]
    parts += [found["decode_speed"], ""] if found["decode_speed"] else []
    parts += [*_healing(found), *_text(found), "Experts kept:", "", *kept, ""]
    return "\n".join([*parts, *(["Warnings:", "", *lines, ""] if lines else [])])


def _healing(found: Mapping[str, Any]) -> list[str]:
    if "healing" not in found:
        return []
    healing, losses = found["healing"], found["healing"]["losses"]
    what = {"lora": "low-rank additions to attention and experts", "router-kd": "routers taught by the source"}
    return [
        f"Healed by {what[healing['method']]}: {len(losses)} steps, loss {losses[0]:.4f} in the first and "
        f"{losses[-1]:.4f} in the last.",
        "",
    ]


def _text(found: Mapping[str, Any]) -> list[str]:
    after = found["after"]
    if "loss" not in after:
        return []
    machine = after["machine"]
    return [
        f"Perplexity on {after['tokens']:,} held-out tokens in windows of {after['seq_len']} that do not overlap "
        f"(stride {after['stride']}). Speed of one sequence in {after['dtype']} on {machine['cpu']}"
        f"{' with ' + str(machine['device']) if machine.get('device') else ''}: a prompt of {after['prompt_tokens']} "
        "tokens, then tokens one by one.",
        "",
    ]


def figures(found: Mapping[str, Any]) -> Sequence[tuple[str, str, str]]:
    """(name, before, after) of everything that was measured on both."""
    shown = [
        ("perplexity", lambda side: f"{side['perplexity']:.3f}"),
        ("bits per byte", lambda side: f"{side['bpb']:.4f}"),
        ("parameters", lambda side: f"{side['parameters']['total']:,}"),
        ("of experts", lambda side: f"{side['parameters']['experts']:,}"),
        ("active for a token", lambda side: f"{side['parameters']['active']:,}"),
        ("bytes on disk", lambda side: f"{side['disk_bytes']:,}"),
        ("peak memory, MiB", lambda side: f"{(side['peak_device_bytes'] or side['peak_host_bytes']) / 2**20:,.0f}"),
        ("prefill, tokens/s", lambda side: f"{side['prefill_tokens_per_s']:,.1f}"),
        ("decode, tokens/s", lambda side: f"{side['decode_tokens_per_s']:,.1f}"),
    ]
    lines = []
    for name, show in shown:
        try:
            lines.append((name, show(found["before"]), show(found["after"])))
        except KeyError:
            continue
    without = found.get("healing", {}).get("without")
    if without:
        unhealed = {"before": found["before"], "after": without}
        lines[2:2] = [(f"{name}, not healed", show(unhealed["before"]), show(without)) for name, show in shown[:2]]
        return lines + _task_lines(found) + _task_lines(unhealed, ", not healed")
    return lines + _task_lines(found)


def _task_lines(found: Mapping[str, Any], which: str = "") -> list[tuple[str, str, str]]:
    before, after = (found[side].get("tasks", {}).get("tasks", {}) for side in ("before", "after"))

    def shown(side: Mapping[str, Any], task: str, metric: str) -> str:
        return f"{side[task]['metrics'][metric]['value']:.4f}"

    return [
        (f"{task}, {metric}{which}", shown(before, task, metric), shown(after, task, metric))
        for task, scores in before.items()
        for metric in scores["metrics"]
    ]

"""A plan applied to a folder of the Hugging Face format: tensors stream from one folder into another, file by file."""

import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

import moestro
from moestro.compress.config_text import edited
from moestro.compress.custom import custom_changes, modeling_text
from moestro.compress.feasible import STOCK, Output, check_plan, limits_of
from moestro.compress.fingerprint import fingerprint, require_source
from moestro.compress.plan import Plan, PlanError
from moestro.compress.plan_file import plan_text, tensor_file
from moestro.compress.projection import uniform
from moestro.compress.quantised import quantisation_config
from moestro.compress.rewriting import Rewriting
from moestro.formats import Checkpoint
from moestro.formats.companions import companions
from moestro.formats.complete import COUNTS_BY_LAYER
from moestro.formats.sharded import index_of
from moestro.formats.shards import INDEX, SINGLE, Shards, read_json
from moestro.formats.writer import Outgoing
from moestro.ops.whole_files import require_intact, sha256_json
from moestro.train.durable import write_json, write_text
from moestro.train.folder_job import FolderJob, clear_finished, lies_in, named_folder

# What a compressed folder says of how it was made, and the plan it was made by.
RECORD, PLAN = "compression.json", "compression_plan.json"
# The request that a plan came from, where there was one.
REQUESTED = "compression_request.json"
# What was measured, for programs and for readers, and what a folder says of its healing.
REPORT, PAGE, HEALING = "report.json", "report.html", "healing.json"
# What the report adds to, or may be changed by hand, and so has no hash.
EDITED = ("README.md", "generation_config.json")
MODELING = "modeling_compressed.py"
# What a folder that was compressed before says of that, and not of this.
OWN_WORDS = {RECORD, PLAN, REQUESTED, REPORT, PAGE, HEALING}
NUMBERED = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
Progress = Callable[[str, int, int], None]


def apply_plan(
    source: Path,
    plan: Plan,
    destination: Path,
    output: Output = STOCK,
    plan_path: Path | None = None,
    progress: Progress = lambda file, done, total: None,
) -> Path:
    """Write the checkpoint in `source` as `plan` makes it into `destination`, which appears complete or not at all.

    Memory is bounded by one expert's matrices and a few pieces of 16 MiB; no model is built. The same arguments give
    the same bytes; interrupted, the same call continues after the last finished file; finished, it changes nothing.
    A plan that changes nothing copies every file of the model. `plan_path` says where the plan's tensors lie, if it has
    any.

    Raises: PlanError where plan, source, destination and layout do not fit; FormatError or DamagedFile for a damaged
    source.
    """
    checkpoint, destination = Checkpoint(source), outside(source, destination)
    found = fingerprint(checkpoint)
    require_source(plan, found, checkpoint.path)
    require_intact(checkpoint.path)
    plan = uniform(plan, limits_of(checkpoint)) if output.uniform else plan
    check_plan(plan, checkpoint, output)
    job = {"plan": sha256_json(plan_text(plan)), **asdict(output)}
    if (there := _there(destination, job)) is not None:
        clear_finished(destination)
        return there
    rewriting = Rewriting(checkpoint, plan, output.layout, output.densify, _tensors(plan, plan_path))
    files = _named(rewriting.files())
    destination.parent.mkdir(parents=True, exist_ok=True)
    with FolderJob(destination, {**job, "moestro": moestro.__version__}) as folder:
        _require_space(folder, files)
        for place, (name, (old, tensors)) in enumerate(files.items()):
            progress(name, place, len(files))
            if plan.identical:
                folder.copy(name, checkpoint.path / old)
            else:
                folder.write(name, tensors, checkpoint.shards.metadata[old] or {"format": "pt"})
        _companions(folder, rewriting, output, {name: tensors for name, (_, tensors) in files.items()})
        write_text(folder.path / PLAN, plan_text(plan))
        write_json(
            folder.path / RECORD, {**job, "moestro": moestro.__version__, "files": dict(sorted(folder.done.items()))}
        )
        _require_whole(folder.path, rewriting, output)
        folder.record_hashes(but=EDITED)
        return folder.publish()


def _there(destination: Path, job: dict[str, Any]) -> Path | None:
    """The destination where it is finished and was made by the same job, None where there is nothing.

    Raises: PlanError for anything else.
    """
    if not destination.exists():
        return None
    record = destination / RECORD
    said = read_json(record) if record.is_file() else {}
    whole = all(
        (destination / name).is_file() and (destination / name).stat().st_size == file["bytes"]
        for name, file in said.get("files", {}).items()
        if name not in EDITED
    )
    if whole and {key: said.get(key) for key in job} == job:
        return destination
    made = "holds another compression" if whole and said else "exists and is no finished compression by this plan"
    raise PlanError(f"{destination} {made}: choose another folder, or remove it")


def outside(source: Path, destination: Path) -> Path:
    """The folder to be written (`named_folder`).

    Raises: PlanError where writing it would write into the source, or it is the root of a file system.
    """
    if lies_in(destination, source):
        raise PlanError(f"{destination} lies in the source {source}, which is never changed: choose another folder")
    try:
        return named_folder(destination)
    except ValueError as error:
        raise PlanError(str(error)) from error


def _tensors(plan: Plan, plan_path: Path | None) -> dict[str, Tensor]:
    if plan.tensors is None:
        return {}
    if plan_path is None:
        raise PlanError(f"the plan has tensors in {plan.tensors.file}: say where the plan lies (tensors.file)")
    return load_file(tensor_file(plan_path, plan.tensors))


def _named(files: dict[str, list[Outgoing]]) -> dict[str, tuple[str, list[Outgoing]]]:
    """{file of the destination: file of the source, its tensors}: numbered again where a file lost all its tensors."""
    old = sorted(files)
    count = len(old)
    renumber = all(NUMBERED.fullmatch(name) for name in old) and f"-of-{count:05}." not in old[0]
    new = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)] if renumber else old
    return {name: (was, files[was]) for name, was in zip(new, old, strict=True)}


def _require_space(folder: FolderJob, files: dict[str, tuple[str, list[Outgoing]]]) -> None:
    need = sum(tensor.nbytes for name, (_, all_) in files.items() if name not in folder.done for tensor in all_)
    free = shutil.disk_usage(folder.path).free
    if need > free:
        raise PlanError(f"{folder.destination} needs {need / 1e9:.2f} GB more, {free / 1e9:.2f} GB are free")


def _companions(folder: FolderJob, rewriting: Rewriting, output: Output, files: dict[str, list[Outgoing]]) -> None:
    """Everything but tensors: configuration, index, tokenizer, remote code."""
    source, plan = rewriting.checkpoint.path, rewriting.plan
    for file in companions(source):
        if (name := file.relative_to(source).as_posix()) not in OWN_WORDS:
            folder.copy(name, file)
    if plan.identical:
        names = ["config.json", *([INDEX] if (source / INDEX).is_file() else [])]
        for name in names:
            folder.copy(name, source / name)
        return
    if output.layout == "custom":
        write_text(folder.path / MODELING, modeling_text(rewriting.checkpoint))
    text = (source / "config.json").read_text(encoding="utf-8")
    write_text(folder.path / "config.json", edited(text, config_changes(rewriting, output)))
    if SINGLE not in files:
        said = (rewriting.checkpoint.shards.index or {}).get("metadata")
        write_json(folder.path / INDEX, index_of(files, said))


def config_changes(rewriting: Rewriting, output: Output) -> dict[str, Any]:
    """Keys of config.json that say something else of the compressed model."""
    family, config, plan = rewriting.family, rewriting.checkpoint.config, rewriting.plan
    changes: dict[str, Any] = {}
    if rewriting.dropped_layers and "num_nextn_predict_layers" in config:
        changes["num_nextn_predict_layers"] = 0
    if plan.quantise is not None:
        changes["quantization_config"] = quantisation_config(plan.quantise)
    if output.layout == "custom":
        return {**changes, **custom_changes(rewriting, MODELING)}
    counts = [rewriting.slots[layer].count for layer in rewriting.checkpoint.moe_layers]
    if COUNTS_BY_LAYER in config:
        changes[COUNTS_BY_LAYER] = counts
    changes |= dict.fromkeys(family.count_keys, counts[0])
    if plan.layers[0].narrows:
        changes[family.width_key] = rewriting.experts.width(plan.layers[0], 0)
    return changes


def _require_whole(folder: Path, rewriting: Rewriting, output: Output) -> None:
    """Raises: FormatError where what was written is no folder of its family (a mistake of ours, found before anybody
    reads it)."""
    if output.layout == "custom" or rewriting.plan.quantise is not None:
        Shards(folder)
        return
    written = Checkpoint(folder)
    for layer in written.moe_layers:
        if written.family and written.n_experts(layer) != rewriting.slots[layer].count:
            raise PlanError(f"layer {layer} was written with {written.n_experts(layer)} experts: a mistake in moestro")

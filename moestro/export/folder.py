"""`moestro export`: a run's model as a folder in Hugging Face's format, complete or not there at all."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from moestro import __version__
from moestro.export.card import Facts
from moestro.export.exported import RECORD
from moestro.export.own import OwnContents
from moestro.export.pretrained import PretrainedContents
from moestro.export.tensors import ExportError
from moestro.formats.sharded import files_of, index_of
from moestro.formats.shards import INDEX
from moestro.formats.writer import Outgoing
from moestro.recipe.evaluation import CHECKPOINTS, untrained
from moestro.recipe.load import Recipe, load_recipe
from moestro.recipe.pretrained import Pretrained
from moestro.train.durable import write_json
from moestro.train.folder import RunFolder
from moestro.train.folder_job import FolderJob, clear_finished, lies_in, named_folder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = ("moestro", "stock")
# What may be changed by hand, and so has no hash.
EDITED = ("README.md", "generation_config.json")
# What others leave in a folder that they read.
LEFTOVERS = {"__pycache__", ".DS_Store", ".cache"}


@dataclass(frozen=True)
class Choices:
    """How a run is exported. `layout`: our own with its code (moestro), or a stock architecture (stock); None: ours for
    models of ours, stock for pretrained ones. `dtype` of the weights by name, None: as the checkpoint keeps them. Files
    of up to `shard_bytes`. `checkpoint`: newest or best. `unfinished` allows a run in the middle of training, `force`
    replaces an earlier export. `licence` of the weights, for the card."""

    layout: str | None = None
    dtype: str | None = None
    shard_bytes: int = 5_000_000_000
    checkpoint: str = "newest"
    unfinished: bool = False
    force: bool = False
    licence: str | None = None


@dataclass(frozen=True)
class Exported:
    """What was written: the folder, its architecture, parameters, bytes of its weights."""

    path: Path
    architecture: str
    n_parameters: int
    nbytes: int


def export_run(run: str | Path, out: str | Path, choices: Choices = Choices()) -> Exported:  # noqa: B008
    """Write a run's model into the folder `out`, which appears complete or not at all. Tensors stream from the
    checkpoint. Interrupted, the same call continues after the last whole file; finished, it changes nothing.

    Raises: RecipeError where `run` is no run; CheckpointError for a missing or damaged checkpoint; ExportError where
    training is not over, `out` holds something else, the disk is full, or the model has no such layout.
    """
    run, out = Path(run), _destination(Path(out))
    if not run.is_dir():
        raise ExportError(f"no such run folder: {run}")
    if not (run / "recipe.yaml").is_file():
        raise ExportError(f"{run} is not the folder of a run: it holds no recipe.yaml")
    recipe = load_recipe(run / "recipe.yaml")
    if isinstance(recipe.model, Pretrained) and lies_in(out, recipe.model.folder):
        raise ExportError(f"{out} lies in {recipe.model.folder}, which is only read: choose another folder")
    choices = replace(choices, layout=choices.layout or LAYOUTS[isinstance(recipe.model, Pretrained)])
    checkpoint = None if untrained(recipe, run) else CHECKPOINTS[choices.checkpoint](run)
    result = RunFolder(run).result
    if checkpoint and result is None and not choices.unfinished:
        raise ExportError(
            f"training of {run} is not over ({checkpoint.name} is its checkpoint): finish it (moestro train), or "
            "export what there is (--unfinished)"
        )
    contents = _contents(recipe, run, checkpoint, choices)
    facts = Facts(
        run.resolve().name, contents.step, result is not None, contents.n_parameters, result or {},
        choices.licence, str(choices.layout), choices.dtype or "as trained", contents.causal,
    )  # fmt: skip
    files = files_of(contents.tensors, choices.shard_bytes)
    job = {"moestro": __version__, "weights": contents.weights, **asdict(choices)}
    del job["force"], job["unfinished"]
    if (there := _there(out, job, choices.force)) is None:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            _write(out, job, contents, files, facts)
        except (OSError, SafetensorError) as error:
            raise ExportError(f"cannot write {out}: {error}. Free space or choose another folder; the same command "
                              "continues") from error  # fmt: skip
    else:
        clear_finished(out)
    nbytes = sum(tensor.nbytes for tensors in files.values() for tensor in tensors)
    return Exported(there or out, contents.architecture, contents.n_parameters, nbytes)


def _contents(recipe: Recipe, run: Path, checkpoint: Path | None, choices: Choices) -> OwnContents | PretrainedContents:
    dtype = None if choices.dtype is None else DTYPES[choices.dtype]
    # only pretrained models have weights before there is a checkpoint
    if checkpoint is not None and not isinstance(recipe.model, Pretrained):
        return OwnContents(recipe, run, checkpoint, str(choices.layout), dtype)
    if choices.layout != "stock":
        raise ExportError(f"{run} is of a pretrained model, which needs no code of ours: --format stock writes it as "
                          "the architecture that it came as")  # fmt: skip
    return PretrainedContents(recipe, run, checkpoint, dtype)


def _destination(out: Path) -> Path:
    """Raises: ExportError for the root of a file system."""
    try:
        return named_folder(out)
    except ValueError as error:
        raise ExportError(str(error)) from error


def _write(
    out: Path,
    job: Mapping[str, Any],
    contents: OwnContents | PretrainedContents,
    files: Mapping[str, Sequence[Outgoing]],
    facts: Facts,
) -> None:
    """Fill the folder under a temporary name, then give it its own."""
    with FolderJob(out, job) as folder:
        need = sum(t.nbytes for name, tensors in files.items() if name not in folder.done for t in tensors)
        if need > (free := shutil.disk_usage(folder.path).free):
            raise ExportError(f"{out} needs {need / 1e9:.2f} GB more, {free / 1e9:.2f} GB are free")
        for name, tensors in files.items():
            folder.write(name, tensors, {"format": "pt"})
        if len(files) > 1:
            write_json(folder.path / INDEX, index_of(files))
        contents.companions(folder.path, facts)
        contents.verify(folder.path)
        folder.record_hashes(but=EDITED)
        beside = sorted(path.name for path in folder.path.iterdir() if path.name not in folder.done)
        said = {"step": facts.step, "files": dict(sorted(folder.done.items())), "beside": beside}
        write_json(folder.path / RECORD, {**job, **said})
        folder.publish()


def _there(out: Path, job: Mapping[str, Any], force: bool) -> Path | None:
    """The folder where it is finished and was written by the same command; None where it is to be written.

    Raises: ExportError where it holds anything else that `force` may not replace.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    said = _record(out)
    files = said["files"]
    whole = all((out / name).is_file() and (out / name).stat().st_size == files[name].get("bytes") for name in files)
    if whole and {key: said.get(key) for key in job} == dict(job):
        return out
    if not force:
        raise ExportError(f"{out} holds another export: choose another folder, or replace it (--force)")
    written = {*files, *said["beside"], RECORD}
    if added := sorted(path.name for path in out.iterdir() if path.name not in written | LEFTOVERS):
        raise ExportError(f"{out} holds what no export wrote ({', '.join(added[:3])}): move it, then --force again")
    return None


def _record(out: Path) -> dict[str, Any]:
    """What an earlier export says that it wrote.

    Raises: ExportError where there was none.
    """
    try:
        said = json.loads((out / RECORD).read_text(encoding="utf-8"))
        if all(isinstance(said[key], kind) for key, kind in {"weights": str, "files": dict, "beside": list}.items()):
            return said
    except (OSError, ValueError, TypeError, KeyError):
        pass
    raise ExportError(f"{out} exists and no export wrote it: choose another folder, or remove it")

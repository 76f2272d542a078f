"""The whole of one compression: a plan, kept while it is needed, and the folder that it makes."""

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from moestro.compress.applying import PLAN, REQUESTED, Progress, apply_plan, outside
from moestro.compress.feasible import STOCK, Output, limits_of
from moestro.compress.fingerprint import fingerprint
from moestro.compress.methods import METHODS, Request, checked
from moestro.compress.own import apply_to_run
from moestro.compress.plan import Plan, PlanError
from moestro.compress.plan_file import read_plan, write_plan
from moestro.compress.projection import uniform
from moestro.compress.source import RunSource, open_source
from moestro.ops.whole_files import TEMPORARY, holding, sha256_json
from moestro.recipe.syntax import unknown
from moestro.train.durable import empty, write_json
from moestro.train.folder_job import FolderInUse, read_control

REQUEST, PLAN_FILE = "request.json", "plan.json"


def plan_for(request: Request, path: Path) -> Plan:
    """The plan of a request, written to `path`; tensors that it needs lie beside it.

    Raises: PlanError where it cannot be routed or written (before anything is measured), or the method is not known.
    """
    require_possible(request)
    path.parent.mkdir(parents=True, exist_ok=True)
    plan = METHODS[request.method](replace(request, folder=path.parent))
    write_plan(plan, path)
    return plan


def require_possible(request: Request) -> None:
    """Raises: PlanError where the method is not known, or what is asked for cannot be routed or written."""
    if request.method not in METHODS:
        raise PlanError(unknown("method", request.method, METHODS))
    checked(request)


def compressed(request: Request, destination: Path, progress: Progress = lambda file, done, total: None) -> Path:
    """A request carried out: plan, then folder. Interrupted, the same call continues, and makes no finished plan again;
    finished, it measures nothing. Nothing is left of a request that is refused.

    Raises: PlanError, FormatError; FolderInUse where another process writes the same folder.
    """
    destination = outside(request.source, destination)
    wanted = wanted_by(request)
    kept = destination.with_name(f"{TEMPORARY}{destination.name}.plan")
    try:
        with holding(kept, FolderInUse(destination)):
            if read_control(kept / REQUEST) != wanted and destination.exists():
                shutil.rmtree(kept)
                return _finished(request, destination, wanted)
            path = _planned(request, kept, wanted)
            folder = applied_to(request.source, read_plan(path), destination, request.output, path, progress)
            write_json(folder / REQUESTED, wanted)
            shutil.rmtree(kept)
            return folder
    except OSError as error:
        raise PlanError(f"cannot make {destination}: {error}. Free space or choose another folder; the same command "
                        "continues") from error  # fmt: skip


def _planned(request: Request, kept: Path, wanted: dict[str, Any]) -> Path:
    """The request's plan in the folder `kept`: made, or continued, or already there. Nothing stays of a request that
    is refused.

    Raises: PlanError.
    """
    path = kept / PLAN_FILE
    try:
        if read_control(kept / REQUEST) != wanted:
            # before anything is measured
            require_possible(request)
            empty(kept)
            write_json(kept / REQUEST, wanted)
        if not path.is_file():
            plan_for(request, path)
    except ValueError:
        shutil.rmtree(kept)
        raise
    return path


def wanted_by(request: Request) -> dict[str, Any]:
    """What tells a request from others: everything asked for, and what the source is."""
    asked = {**asdict(request), "source": str(request.source.resolve()), "reference": str(request.reference)}
    return {
        "request": sha256_json({name: str(value) for name, value in asked.items()}),
        "source": asdict(fingerprint(open_source(request.source))),
    }


def _finished(request: Request, destination: Path, wanted: dict[str, Any]) -> Path:
    """The destination, where this request made it and its files are there.

    Raises: PlanError for anything else.
    """
    if not destination.is_dir() or read_control(destination / REQUESTED) != wanted:
        raise PlanError(f"{destination} exists and was made otherwise: choose another folder, or remove it")
    plan = read_plan(destination / PLAN, whole=False)
    return applied_to(request.source, plan, destination, request.output)


def applied_to(
    source: Path,
    plan: Plan,
    destination: Path,
    output: Output = STOCK,
    plan_path: Path | None = None,
    progress: Progress = lambda file, done, total: None,
) -> Path:
    """A plan applied to a Hugging Face folder (`applying.apply_plan`) or a run (`own.apply_to_run`).

    Raises: PlanError, FormatError.
    """
    found = open_source(source)
    if not isinstance(found, RunSource):
        return apply_plan(source, plan, destination, output, plan_path, progress)
    if output.layout != "stock":
        raise PlanError(f"a run keeps its own format: --format {output.layout} is for Hugging Face folders")
    return apply_to_run(found, uniform(plan, limits_of(found)) if output.uniform else plan, destination)

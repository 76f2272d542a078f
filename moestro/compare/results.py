"""From finished runs to results.json."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import moestro
from moestro.compare.isoflop import fit_isoflop
from moestro.compare.job import Job
from moestro.compare.match import Match, Size
from moestro.compare.plan import Comparison
from moestro.compare.verdict import cells, winner
from moestro.data import Dataset, zlib_bpb
from moestro.ops.whole_files import require_intact
from moestro.train.environment import describe_machine
from moestro.upgrades import COMPARISON

# A train curve has at most so many points.
CURVE_POINTS = 200


def collect(
    plan: Comparison,
    dataset: Dataset,
    all_sizes: Sequence[Size],
    matches: Mapping[tuple[str, str], Match],
    jobs: Sequence[Job],
    failures: Mapping[str, str],
    command: str,
) -> dict[str, Any]:
    """Everything that the table and the report need, of runs finished or not."""
    machine = describe_machine(torch.device(jobs[0].device))
    del machine["commit"]
    results: dict[str, Any] = {
        COMPARISON.key: COMPARISON.version,
        "title": plan.title or plan.path.stem,
        "command": command,
        "moestro": moestro.__version__,
        "commit": commits(jobs),
        "machine": machine,
        "corpus": {
            "name": dataset.name,
            "fingerprint": dataset.text_fingerprint,
            "bytes": dataset.n_train_bytes + dataset.n_val_bytes,
            "zlib_bpb": zlib_bpb(dataset),
        },
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seeds": list(plan.seeds),
        "budgets": list(plan.budgets),
        "sizes": [
            {"name": size.name, "flops_per_token": size.token_flops, "parameters": size.parameters}
            for size in all_sizes
        ],
        "reference": plan.reference,
        "arms": {name: describe_arm(plan, name, matches) for name in plan.arms},
        "runs": [describe_run(job, failures.get(job.name)) for job in jobs],
        "sample": {
            job.arm: summary["sample"] for job in jobs if (summary := job.summary) and summary["sample"] is not None
        },
    }
    results["isoflop"] = isoflop(results)
    results["winner"] = winner(results)
    return results


def commits(jobs: Sequence[Job]) -> str | None:
    """The source commits at which the finished runs were trained."""
    known = {summary["commit"] for job in jobs if (summary := job.summary) and summary["commit"]}
    return ", ".join(sorted(known)) or None


def describe_arm(plan: Comparison, name: str, matches: Mapping[tuple[str, str], Match]) -> dict[str, Any]:
    """Title, recipe, and what was solved at each size, with the error of the match."""
    arm = plan.arms[name]
    solved = {}
    for (matched, size), found in matches.items():
        if matched == name and arm.solve is not None:
            solved[f"{arm.solve} at {size}"] = f"{found.settings[arm.solve]} ({found.error:+.2%} FLOPs a token)"
    about = {"title": arm.title or name, "description": arm.description, "solved": solved}
    return {**about, "recipe": str(plan.recipe_path(name))}


def describe_run(job: Job, failure: str | None) -> dict[str, Any]:
    """One entry of `runs`."""
    entry: dict[str, Any] = {
        "arm": job.arm,
        "size": job.size,
        "budget": job.budget,
        "seed": job.seed,
        "run_dir": str(job.folder),
        "expected_flops_per_token": job.expected_token_flops,
    }
    summary = job.summary
    if summary is None:
        return {**entry, "status": "failed" if failure else "unfinished", "error": failure}
    steps, evaluations = read_metrics(job.folder / "metrics.jsonl")
    last = steps[-1]
    return {
        **entry,
        "status": "done",
        "params_total": summary["params_total"],
        "params_active": summary["params_active"],
        "tokens": last["tokens"],
        "flops": last["flops"],
        "flops_computed": last["flops_computed"],
        "used_flops_per_token": last["flops"] / last["tokens"],
        "computed_flops_per_token": last["flops_computed"] / last["tokens"],
        "seconds": last["time"]["seconds"],
        "tokens_per_s": last["tokens"] / last["time"]["seconds"],
        "final": summary["final"],
        "curve": curve(steps, evaluations),
        "train_curve": [{"flops": s["flops"], "loss": s["loss"]} for s in thinned([s for s in steps if "loss" in s])],
        "routing": summary["routing"],
    }


def read_metrics(path: Path) -> tuple[list[dict], list[dict]]:
    """The step lines and the evaluation lines of a run."""
    require_intact(path.parent, path.name)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "flops" in line], [line for line in lines if "eval" in line]


def curve(steps: Sequence[Mapping], evaluations: Sequence[Mapping]) -> list[dict[str, Any]]:
    """Held-out bits per byte along the run."""
    at = {step["step"]: step for step in steps}
    return [
        {key: at[line["step"]][key] for key in ("flops", "tokens", "step")} | {"bpb": line["eval"]["bpb"]}
        for line in evaluations
    ]


def thinned(steps: Sequence[Mapping]) -> list[Mapping]:
    """At most `CURVE_POINTS` of the steps, evenly spread, the last one included."""
    stride = max(1, math.ceil(len(steps) / CURVE_POINTS))
    return list(steps[::-1][::stride][::-1])


def isoflop(results: Mapping) -> dict[str, Any]:
    """For each budget and arm the points (active parameters, mean and spread of bits per byte) and their parabola."""
    out: dict[str, Any] = {}
    for cell in cells(results):
        if cell.runs:
            arm = out.setdefault(str(cell.budget), {}).setdefault(cell.arm, {"points": []})
            arm["points"].append([cell.average("params_active"), cell.mean, cell.std])
    for arms in out.values():
        for arm in arms.values():
            arm["fit"] = fit_isoflop(arm["points"])
    return out

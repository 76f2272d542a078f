"""The command that every study has: train what is not trained yet, measure the effects, print and write them."""

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from bench.effects.corpora import DATA
from bench.effects.effect import Effect
from bench.effects.study import Study, Work
from bench.effects.table import effects_summary
from bench.harness import ROOT, machine
from moestro.data.cache import digest
from moestro.train.durable import write_json


def main(
    study: Study,
    effects: Sequence[Effect],
    description: str,
    words: Sequence[str] | None = None,
    work_of: type[Work] = Work,
) -> dict:
    """Run `study` as the command line says; returns the results, which `--json` also writes."""
    options = arguments(study, description, words)
    if options.quick:
        study = study.quick()
    with contextlib.ExitStack() as stack:
        temporary = options.quick and options.out is None
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) if temporary else options.out
        work = work_of(study, folder or ROOT / "runs" / "effects" / study.name, options.data)
        work.train(options.workers)
        results = collect(work, effects)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.json, results)
    Console(width=None if sys.stdout.isatty() else 200).print(Markdown(effects_summary(results)))
    return results


def arguments(study: Study, description: str, words: Sequence[str] | None) -> argparse.Namespace:
    """The options of every study."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few steps of every arm: shows that it works, no effect")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results as JSON")
    parser.add_argument("--data", type=Path, metavar="FOLDER", default=DATA, help="folder of the corpora")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=f"work folder, default runs/effects/{study.name}")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="runs at a time, one thread each")
    return parser.parse_args(words)


def collect(work: Work, effects: Sequence[Effect]) -> dict[str, Any]:
    """The results of a study whose runs are all finished."""
    study = work.study
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    for job in work.jobs:
        runs.setdefault(job.size, {}).setdefault(job.seed, {})[job.arm] = job.summary
    rows = [effect.row(corpus, runs[corpus]) for effect in effects for corpus in study.corpora]
    # of measuring, and of training where that was earlier
    measured = {str(run["commit"]) for seeds in runs.values() for arms in seeds.values() for run in arms.values()}
    commits = measured.union(*(trained_at(job.folder, job.summary or {}) for job in work.jobs))
    return {
        "script": f"bench/effects/{study.name}.py",
        "commit": ", ".join(sorted(commits)),
        "machine": machine(threads=1),
        "seeds": list(study.seeds),
        "corpora": {
            name: {"fingerprint": data.text_fingerprint, "bytes": data.n_train_bytes + data.n_val_bytes}
            for name, data in work.datasets.items()
        },
        "study": described(study),
        "rows": rows,
        "runs": [
            {
                "corpus": job.size,
                "arm": job.arm,
                "seed": job.seed,
                "bpb": run["final"]["bpb"],
                "held_out_tokens": run["final"]["tokens"],
                "commit": [commit[:12] for commit in trained_at(job.folder, run)],
                **{key: run[key] for key in ("step", "tokens", "flops", "params_total", "params_active")},
            }
            for job in work.jobs
            if (run := job.summary) is not None
        ],
    }


def trained_at(folder: Path, run: Mapping[str, Any]) -> list[str]:
    """The commits at which a run was trained, in their order; where its folder does not say, that of its summary."""
    file = folder / "environment.json"
    if not file.exists():
        return [str(run["commit"])]
    return list(dict.fromkeys(str(session["commit"]) for session in json.loads(file.read_text(encoding="utf-8"))))


def described(study: Study) -> dict[str, Any]:
    """Everything that decides the runs but the corpora, and its digest."""
    arms = {name: {"recipe": arm.recipe, "settings": dict(arm.settings)} for name, arm in study.arms.items()}
    for name, arm in study.arms.items():
        arms[name] |= {key: value for key, value in (("start", arm.start), ("text", arm.text)) if value}
    plain = json.loads(json.dumps({"budget": study.budget, "common": dict(study.common), "arms": arms}))
    return {**plain, "digest": digest(plain)}

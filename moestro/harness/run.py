"""Tasks one after another, and their figures."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lm_eval.evaluator import simple_evaluate

from moestro.harness.adapter import ScoredModel
from moestro.harness.catalogue import local_tasks, resolve_tasks
from moestro.harness.trust import sandbox_templates

# resamplings of standard errors that have no formula, such as that of LAMBADA's perplexity
BOOTSTRAPS = 1000


def evaluate_tasks(
    scored: ScoredModel,
    tasks: Sequence[str],
    data: str | Path,
    limit: int | None = None,
    seed: int = 0,
    begun: Callable[[str], None] = lambda name: None,
    trust_code: bool = False,
) -> dict[str, Any]:
    """{task: {"n": rows, "cut": share of scored texts whose context was cut, "metrics": {name: {"value", "stderr"}}}}
    and what it was made with, as JSON values.

    `limit` takes only the first rows of each task. Each task is seeded alone, so that its figures do not depend on the
    others. `begun` hears of each. Files of your own may run code of theirs only with `trust_code`.

    Raises: RecipeError for an unknown task; FileNotFoundError, ValueError for files that are missing or malformed.
    """
    # a pool of processes beside torch's threads can hang, and the resampling takes seconds
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    sandbox_templates()
    tasks_of = local_tasks(data)
    names = resolve_tasks(tasks, trust_code)
    figures: dict[str, Any] = {}
    for name in names:
        begun(name)
        scored.n_cut = scored.n_scored = 0
        # it prints what it resamples, where figures may be written
        with redirect_stdout(sys.stderr):
            found = simple_evaluate(
                scored,
                tasks=[name],
                task_manager=tasks_of,
                limit=limit,
                bootstrap_iters=BOOTSTRAPS,
                log_samples=False,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
        figures |= _figures(dict(found or {}), scored.n_cut / max(1, scored.n_scored))
    made_with = {"lm_eval": version("lm-eval"), "data": str(data), "limit": limit, "seed": seed}
    return {"tasks": figures, **made_with, "max_length": scored.max_length}


def _figures(found: Mapping[str, Any], cut: float) -> dict[str, Any]:
    return {
        task: {"n": found["n-samples"][task]["effective"], "cut": cut, "metrics": _metrics(values)}
        for task, values in found["results"].items()
    }


def _metrics(values: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Values and standard errors, from keys such as "acc,none" and "acc_stderr,none"."""
    numbers = {key.split(",")[0]: value for key, value in values.items() if "," in key}
    return {
        name: {"value": float(value), "stderr": _number(numbers.get(f"{name}_stderr"))}
        for name, value in numbers.items()
        if not name.endswith("_stderr")
    }


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None

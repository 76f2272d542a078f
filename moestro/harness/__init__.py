"""Floor 11: tasks of the literature through `lm-eval`, from local files: what `moestro eval MODEL --tasks` runs."""

from moestro.harness.adapter import ScoredModel
from moestro.harness.catalogue import resolve_tasks, task_names
from moestro.harness.run import evaluate_tasks
from moestro.harness.table import tasks_table

__all__ = ["ScoredModel", "evaluate_tasks", "resolve_tasks", "task_names", "tasks_table"]

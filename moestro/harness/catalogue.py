"""Which tasks there are, and which ones a command names."""

from collections.abc import Sequence
from pathlib import Path

from lm_eval.tasks import TaskManager

from moestro.harness.trust import composed, require_no_code
from moestro.recipe.syntax import RecipeError, unknown

TASKS = Path(__file__).parent / "tasks"
# where a task file may have its rows from
SOURCES = ("include", "custom_dataset", "dataset_path", "group")


def local_tasks(data: str | Path) -> TaskManager:
    """The tasks of this package, reading their files from the folder `data`."""
    return TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"data": str(data)})  # type: ignore[dict-item]


def task_names() -> list[str]:
    """Every task and every name of several tasks."""
    return local_tasks(".").all_tasks


def resolve_tasks(names: Sequence[str], trust_code: bool = False) -> list[str]:
    """Single tasks, each once, in order: names stand for themselves, a tag (`papers`) for its tasks, and a path
    ending in .yaml for a task file of your own, which may name code of its own only with `trust_code`.

    Raises: RecipeError for a name that is none, or a file that would run code.
    """
    found: dict[str, None] = {}
    index = local_tasks(".").task_index
    for name in names:
        if name.endswith((".yaml", ".yml")):
            _check_file(Path(name))
            if not trust_code:
                require_no_code(Path(name))
            found[name] = None
        elif name not in index:
            raise RecipeError(f"{unknown('task', name, list(index))} (--tasks)")
        else:
            entry = index[name]
            found.update(dict.fromkeys(sorted(entry.tags) if entry.kind.name == "TAG" else [name]))
    return list(found)


def _check_file(file: Path) -> None:
    content = composed(file)
    keys = {key.value for key, _ in content.value}
    if "task" not in keys or keys.isdisjoint(SOURCES):
        raise RecipeError(f"{file}: no task, or none of {', '.join(SOURCES)} (--tasks)")

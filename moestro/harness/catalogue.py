"""Which tasks there are, and which ones a command names."""

from collections.abc import Sequence
from pathlib import Path

from lm_eval.tasks import TaskManager

from moestro.recipe.syntax import RecipeError, unknown

TASKS = Path(__file__).parent / "tasks"


def local_tasks(data: str | Path) -> TaskManager:
    """The tasks of this package, reading their files from the folder `data`."""
    return TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"data": str(data)})  # type: ignore[dict-item]


def task_names() -> list[str]:
    """Every task and every name of several tasks."""
    return local_tasks(".").all_tasks


def resolve_tasks(names: Sequence[str]) -> list[str]:
    """Single tasks, each once, in order: names stand for themselves, a tag (`papers`) for its tasks, and a path
    ending in .yaml for a task file of your own.

    Raises: RecipeError for a name that is none.
    """
    found: dict[str, None] = {}
    index = local_tasks(".").task_index
    for name in names:
        if name.endswith((".yaml", ".yml")):
            if not Path(name).is_file():
                raise RecipeError(f"no such task file: {name} (--tasks)")
            found[name] = None
        elif name not in index:
            raise RecipeError(f"{unknown('task', name, list(index))} (--tasks)")
        else:
            entry = index[name]
            found.update(dict.fromkeys(sorted(entry.tags) if entry.kind.name == "TAG" else [name]))
    return list(found)

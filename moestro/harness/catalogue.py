"""Which tasks there are, and which ones a command names."""

from collections.abc import Sequence
from pathlib import Path

import yaml
from lm_eval.tasks import TaskManager

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


def resolve_tasks(names: Sequence[str]) -> list[str]:
    """Single tasks, each once, in order: names stand for themselves, a tag (`papers`) for its tasks, and a path
    ending in .yaml for a task file of your own.

    Raises: RecipeError for a name that is none.
    """
    found: dict[str, None] = {}
    index = local_tasks(".").task_index
    for name in names:
        if name.endswith((".yaml", ".yml")):
            _check_file(Path(name))
            found[name] = None
        elif name not in index:
            raise RecipeError(f"{unknown('task', name, list(index))} (--tasks)")
        else:
            entry = index[name]
            found.update(dict.fromkeys(sorted(entry.tags) if entry.kind.name == "TAG" else [name]))
    return list(found)


def _check_file(file: Path) -> None:
    if not file.is_file():
        raise RecipeError(f"no such task file: {file} (--tasks)")
    try:
        # without the objects that its tags name
        content = yaml.compose(file.read_bytes(), Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{file}: not valid YAML: {error} (--tasks)") from error
    if not isinstance(content, yaml.MappingNode):
        raise RecipeError(f"{file}: not a mapping of keys to values (--tasks)")
    keys = {key.value for key, _ in content.value}
    if "task" not in keys or keys.isdisjoint(SOURCES):
        raise RecipeError(f"{file}: no task, or none of {', '.join(SOURCES)} (--tasks)")

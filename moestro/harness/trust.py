"""What a task file may not do unless its reader trusts it: run code.

A task file of lm-eval can name Python functions beside it (`!function`), classes, and templates; templates are rendered
in jinja's sandbox here, which lm-eval itself does not do.
"""

from collections.abc import Iterator
from pathlib import Path

import yaml
from lm_eval import utils as lm_eval_utils

from moestro.recipe.syntax import RecipeError

OWN = "moestro.harness.reading."
CODE_KEYS = frozenset({"class", "unsafe_code"})
CORE_TAG = "tag:yaml.org,2002:"
PLAIN = frozenset(
    CORE_TAG + kind for kind in ("str", "int", "float", "bool", "null", "seq", "map", "timestamp", "merge")
)
FLAG = "--trust-task-code"


def require_no_code(file: Path) -> None:
    """Of a task file and those it includes: no function but this package's own, no class, no tag of Python's.

    Raises: RecipeError that names the file and what in it would run.
    """
    seen: set[Path] = set()
    waiting = [file.resolve()]
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        node = composed(path)
        for found in _code_in(node, path.parent):
            raise RecipeError(f"{path}: {found} would run code; {FLAG} allows it, for files that you trust (--tasks)")
        waiting += [(path.parent / included).resolve() for included in _included(node)]


def composed(file: Path) -> yaml.MappingNode:
    """The file's nodes, without the objects that its tags name.

    Raises: RecipeError where it is no mapping.
    """
    if not file.is_file():
        raise RecipeError(f"no such task file: {file} (--tasks)")
    try:
        node = yaml.compose(file.read_bytes(), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError, OSError) as error:
        raise RecipeError(f"{file}: not valid YAML: {error} (--tasks)") from error
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(f"{file}: not a mapping of keys to values (--tasks)")
    return node


def _included(node: yaml.MappingNode) -> Iterator[str]:
    for key, value in node.value:
        if key.value == "include":
            each = value.value if isinstance(value, yaml.SequenceNode) else [value]
            yield from (str(item.value) for item in each)


def _code_in(node: yaml.Node, folder: Path) -> Iterator[str]:
    shadowed = (folder / "moestro").exists()
    own = node.tag == "!function" and str(node.value).startswith(OWN) and not shadowed
    if node.tag not in PLAIN and not own:
        yield f"{node.tag} {node.value if isinstance(node, yaml.ScalarNode) else ''}".strip()
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.value in CODE_KEYS:
                yield f"the key {key.value!r}"
            yield from _code_in(key, folder)
            yield from _code_in(value, folder)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _code_in(item, folder)


def sandbox_templates() -> None:
    """Let lm-eval render templates of tasks where they reach nothing but the rows that they are given."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    theirs = lm_eval_utils.env
    if isinstance(theirs, ImmutableSandboxedEnvironment):
        return
    ours = ImmutableSandboxedEnvironment(undefined=theirs.undefined, keep_trailing_newline=theirs.keep_trailing_newline)
    ours.filters.update(theirs.filters)
    lm_eval_utils.env = ours

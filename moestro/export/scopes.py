"""Names in a piece of source: which of them mean something of the module around it."""

import ast
from collections.abc import Iterator

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
LOOPS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def outer_names(node: ast.AST, bound: frozenset[str] = frozenset()) -> Iterator[ast.Name]:
    """Every name read in `node` that is bound nowhere in it. Strings in annotations are no names."""
    if isinstance(node, ast.Name):
        if isinstance(node.ctx, ast.Load) and node.id not in bound:
            yield node
    elif isinstance(node, (*FUNCTIONS, ast.Lambda)):
        yield from _of_function(node, bound)
    elif isinstance(node, ast.ClassDef):
        here = bound | _stored(node.body)
        for inner in (*node.bases, *node.keywords, *node.decorator_list):
            yield from outer_names(inner, bound)
        for statement in node.body:
            # what a class binds is not seen inside its functions, but in what surrounds their bodies
            yield from (
                _of_function(statement, bound, here)
                if isinstance(statement, FUNCTIONS)
                else outer_names(statement, here)
            )
    elif isinstance(node, LOOPS):
        here = bound | {name.id for name in ast.walk(node) if isinstance(name, ast.Name) and _is_store(name)}
        for inner in ast.iter_child_nodes(node):
            yield from outer_names(inner, here)
    else:
        for inner in ast.iter_child_nodes(node):
            yield from outer_names(inner, bound)


def _of_function(
    node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda,
    bound: frozenset[str],
    around: frozenset[str] | None = None,
) -> Iterator[ast.Name]:
    around = bound if around is None else around
    body = [node.body] if isinstance(node, ast.Lambda) else node.body
    here = bound | local_names(node)
    outside: list[ast.AST] = [default for default in (*node.args.defaults, *node.args.kw_defaults) if default]
    if not isinstance(node, ast.Lambda):
        outside += [*node.decorator_list, *([node.returns] if node.returns else [])]
        outside += [argument.annotation for argument in arguments(node) if argument.annotation]
    for inner in outside:
        yield from outer_names(inner, around)
    for inner in body:
        yield from outer_names(inner, here)


def arguments(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> list[ast.arg]:
    """Every argument of a function."""
    given = node.args
    return [*given.posonlyargs, *given.args, *given.kwonlyargs, *(a for a in (given.vararg, given.kwarg) if a)]


def local_names(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> frozenset[str]:
    """What a function binds for itself: arguments and what it assigns."""
    names = frozenset(argument.arg for argument in arguments(node))
    return names if isinstance(node, ast.Lambda) else names | _stored(node.body)


def _stored(body: list[ast.stmt]) -> frozenset[str]:
    """Names that statements bind, those inside functions and classes left out."""
    found: set[str] = set()
    waiting: list[ast.AST] = list(body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            found.add(node.name)
            continue
        if isinstance(node, ast.Name) and _is_store(node):
            found.add(node.id)
        if isinstance(node, ast.alias):
            found.add(node.asname or node.name.split(".")[0])
        if isinstance(node, ast.ExceptHandler) and node.name:
            found.add(node.name)
        if not isinstance(node, (ast.Lambda, *LOOPS)):
            waiting += ast.iter_child_nodes(node)
    return frozenset(found)


def _is_store(name: ast.Name) -> bool:
    return isinstance(name.ctx, ast.Store)

"""Source with its decisions taken where their outcome is known: branches that cannot run go."""

import ast
from collections.abc import Callable, Iterator
from typing import Any

from moestro.export.edits import Edit, Text, edited
from moestro.export.scopes import FUNCTIONS

UNKNOWN = object()
# What a call returns, where that is known.
Known = Callable[[ast.Call], Any]


def folded(source: str, known: Known) -> str:
    """The source after every decision that depends on known calls alone. What follows a `return` goes, too."""
    while True:
        text, tree = Text(source), ast.parse(source)
        edits = list(_first_edits(tree, text, known))
        if not edits:
            return source
        source = edited(source, edits)


def _first_edits(node: ast.AST, text: Text, known: Known) -> Iterator[Edit]:
    """Edits that do not overlap: the outermost."""
    for name in ("body", "orelse", "finalbody"):
        block = getattr(node, name, None)
        if isinstance(block, list) and (found := _after_leaving(block, text)):
            yield found
            return
    for inner in ast.iter_child_nodes(node):
        edits = _edits_of(inner, text, known)
        if edits:
            yield from edits
        else:
            yield from _first_edits(inner, text, known)


def _after_leaving(block: list[ast.stmt], text: Text) -> Edit | None:
    for statement in block[:-1]:
        if isinstance(statement, ast.Return | ast.Raise):
            return Edit(text.line((statement.end_lineno or 0) + 1), text.line((block[-1].end_lineno or 0) + 1))
    return None


def _edits_of(node: ast.AST, text: Text, known: Known) -> list[Edit]:
    if isinstance(node, ast.If) and (outcome := value(node.test, known)) is not UNKNOWN:
        return _branch(node, node.body if outcome else node.orelse, text)
    if isinstance(node, ast.IfExp) and (outcome := value(node.test, known)) is not UNKNOWN:
        return [Edit(text.start(node), text.stop(node), text.of(node.body if outcome else node.orelse))]
    if isinstance(node, ast.expr) and not isinstance(node, ast.Constant):
        outcome = value(node, known)
        if isinstance(outcome, bool):
            return [Edit(text.start(node), text.stop(node), str(outcome))]
    return []


def _branch(node: ast.If, taken: list[ast.stmt], text: Text) -> list[Edit]:
    """An `if` becomes the statements of one branch, less deep by one step."""
    first, last = text.line(node.lineno), text.line((node.end_lineno or 0) + 1)
    if not taken:
        return [Edit(first, last)]
    lines = text.lines[text.first_line(taken[0]) - 1 : taken[-1].end_lineno]
    step = taken[0].col_offset - node.col_offset
    return [Edit(first, last, "".join(line[step:] if line.strip() else line for line in lines))]


def value(node: ast.expr, known: Known) -> Any:
    """What an expression is, `UNKNOWN` where that depends on more than known calls."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Call):
        return known(node)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        inner = value(node.operand, known)
        return UNKNOWN if inner is UNKNOWN else not inner
    if isinstance(node, ast.BoolOp):
        each, ends = [value(operand, known) for operand in node.values], isinstance(node.op, ast.Or)
        if any(item is ends for item in each):
            return ends
        return (not ends) if all(item is (not ends) for item in each) else UNKNOWN
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        sides = value(node.left, known), value(node.comparators[0], known)
        if UNKNOWN not in sides and isinstance(node.ops[0], ast.Eq | ast.NotEq):
            return (sides[0] == sides[1]) is isinstance(node.ops[0], ast.Eq)
    return UNKNOWN


def _decides(body: list[ast.stmt]) -> bool:
    """Whether statements are returns, and decisions between returns."""
    return all(
        isinstance(node, ast.Return) or (isinstance(node, ast.If) and _decides([*node.body, *node.orelse]))
        for node in body
    )


def constant(function: ast.AST, known: Known) -> Any:
    """What a function that only decides returns whatever it is given, `UNKNOWN` where that differs."""
    if not isinstance(function, FUNCTIONS) or not _decides(function.body[ast.get_docstring(function) is not None :]):
        return UNKNOWN
    returns = [node for node in ast.walk(function) if isinstance(node, ast.Return)]
    each = [value(node.value, known) if node.value else UNKNOWN for node in returns]
    return each[0] if each and all(item is each[0] for item in each) and isinstance(each[0], bool) else UNKNOWN

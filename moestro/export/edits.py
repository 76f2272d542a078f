"""Changes to source text by the places that its syntax tree names."""

import ast
from collections.abc import Iterable
from typing import NamedTuple


class Edit(NamedTuple):
    """Characters `start` to `stop` become `text`."""

    start: int
    stop: int
    text: str = ""


class Text:
    """Source text, and where its lines and syntax nodes begin and end."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.lines = source.splitlines(keepends=True)
        self._starts = [0]
        for line in self.lines:
            self._starts.append(self._starts[-1] + len(line))

    def line(self, number: int) -> int:
        """Where line `number` begins, counted from 1; one beyond the last is the end."""
        return self._starts[number - 1]

    def start(self, node: ast.expr | ast.stmt) -> int:
        """Where a node begins."""
        return self._place(node.lineno, node.col_offset)

    def stop(self, node: ast.expr | ast.stmt) -> int:
        """Where a node ends."""
        return self._place(node.end_lineno or 0, node.end_col_offset or 0)

    def of(self, node: ast.expr | ast.stmt) -> str:
        """A node's source."""
        return self.source[self.start(node) : self.stop(node)]

    def _place(self, line: int, byte: int) -> int:
        # trees count bytes of UTF-8
        return self.line(line) + len(self.lines[line - 1].encode()[:byte].decode())

    def first_line(self, node: ast.stmt) -> int:
        """The line on which a definition begins, with decorators and the comment above it."""
        decorators = getattr(node, "decorator_list", [])
        number = min([node.lineno, *(decorator.lineno for decorator in decorators)])
        while number > 1 and self.lines[number - 2].lstrip().startswith("#"):
            number -= 1
        return number

    def without(self, node: ast.stmt) -> Edit:
        """The removal of a statement's lines, and of the blank lines before it."""
        first = self.first_line(node)
        while first > 1 and not self.lines[first - 2].strip():
            first -= 1
        return Edit(self.line(first), self.line((node.end_lineno or 0) + 1))


def edited(source: str, edits: Iterable[Edit], first: int = 0, last: int | None = None) -> str:
    """Characters `first` to `last` of the source with all edits in them; of edits inside others the outer ones."""
    last = len(source) if last is None else last
    pieces, place = [], first
    for edit in sorted(edits, key=lambda edit: (edit.start, -edit.stop)):
        if place <= edit.start < last:
            pieces += [source[place : edit.start], edit.text]
            place = min(edit.stop, last)
    return "".join([*pieces, source[place:last]])

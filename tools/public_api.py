"""The public names of moestro with their signatures, read from the source: those in an `__all__`.

    python -m tools.public_api      # writes tests/api/public_api.txt, which a test compares with the source

Nothing is imported, so that the list is the same on every machine, with and without the extras.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIST = ROOT / "tests" / "api" / "public_api.txt"
# Methods that users call without writing their names.
CALLED = {"__init__", "__call__", "__enter__", "__iter__", "__getitem__", "__len__"}


@dataclass(frozen=True)
class Public:
    """A public name: where it is offered, and what defines it."""

    module: str
    name: str
    node: ast.stmt

    @property
    def docstring(self) -> str:
        """What its definition says of it; "" for values."""
        node = self.node
        return (ast.get_docstring(node) or "") if isinstance(node, ast.ClassDef | ast.FunctionDef) else ""

    @property
    def lines(self) -> list[str]:
        """Its signature, and for classes those of their own public methods, a line each."""
        node = self.node
        if isinstance(node, ast.FunctionDef):
            return [f"{self.name}{signature(node)}"]
        if isinstance(node, ast.ClassDef):
            return [class_line(node), *members(node)]
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        return [f"{self.name} = {ast.unparse(value)}" if value is not None else self.name]


@cache
def public_names() -> tuple[Public, ...]:
    """Every name of every `__all__`, by module and in alphabetical order.

    Raises: LookupError for a name that the source does not define.
    """
    return tuple(
        Public(_module_name(path), name, _definition(path, name))
        for path in sorted((ROOT / "moestro").rglob("*.py"))
        if "__all__" in path.read_text(encoding="utf-8")
        for name in sorted(_offered(path))
    )


def document() -> str:
    """The list as text: a module a paragraph, methods indented below their class."""
    modules: dict[str, list[str]] = {}
    for public in public_names():
        # the package itself offers names of its packages, where they are listed whole
        first, *rest = public.lines if public.module != "moestro" else [public.name]
        modules.setdefault(public.module, []).extend([first, *(f"    {line}" for line in rest)])
    return "\n\n".join("\n".join([f"# {module}", *lines]) for module, lines in modules.items()) + "\n"


def signature(node: ast.FunctionDef) -> str:
    """`(a: int, b=2) -> str`"""
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"({ast.unparse(node.args)}){returns}"


def class_line(node: ast.ClassDef) -> str:
    """`class Name(Base)`"""
    bases = ", ".join(map(ast.unparse, node.bases))
    return f"class {node.name}({bases})" if bases else f"class {node.name}"


def members(node: ast.ClassDef) -> Iterator[str]:
    """Fields, methods and properties that a class defines itself, in their order."""
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and item.target.id[0] != "_":
            default = f" = {ast.unparse(item.value)}" if item.value else ""
            yield f"{item.target.id}: {ast.unparse(item.annotation)}{default}"
        elif isinstance(item, ast.FunctionDef) and (item.name in CALLED or item.name[0] != "_"):
            kinds = {ast.unparse(decorator) for decorator in item.decorator_list}
            before = "".join(f"@{kind} " for kind in sorted(kinds & {"property", "classmethod", "staticmethod"}))
            yield f"{before}{item.name}{signature(item)}"


@cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _file_of(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _offered(path: Path) -> list[str]:
    for node in _parsed(path).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]:
            return list(ast.literal_eval(node.value))
    return []


def _definition(path: Path, name: str) -> ast.stmt:
    if name in (imported := _imported(path)):
        module, original = imported[name]
        return _definition(_file_of(module), original)
    for node in _parsed(path).body:
        if name in _defined(node):
            return node
    raise LookupError(f"{path}: {name} is in an __all__ and not defined")


@cache
def _imported(path: Path) -> dict[str, tuple[str, str]]:
    """{name: (module, name there)} of all imports from modules, those under `if TYPE_CHECKING:` too."""
    found = {}
    for node in ast.walk(_parsed(path)):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
    return found


def _defined(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


if __name__ == "__main__":
    LIST.parent.mkdir(exist_ok=True)
    LIST.write_text(document(), encoding="utf-8")
    print(f"wrote {LIST.relative_to(ROOT)}")

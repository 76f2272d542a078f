"""The package's own source, module by module: what each name means, and decisions taken for the plain backend."""

import ast
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from moestro.export.edits import Text
from moestro.export.folding import UNKNOWN, constant, folded

PACKAGE = "moestro"
BACKEND = f"{PACKAGE}.ops.backend"
# The definition of every operation: plain torch on every device, without compiled or fused twins.
KNOWN_CALLS = {(BACKEND, "active"): "reference", (BACKEND, "runs_native"): False}
# Modules that never run there.
ABSENT = (f"{PACKAGE}.ops.native", f"{PACKAGE}.ops.triton_ffn")


class BundleError(RuntimeError):
    """Source that cannot be taken out of the package."""


class Symbol(NamedTuple):
    """A name of a module of the package: `name` is None where the module itself is meant."""

    module: str
    name: str | None


class Imported(NamedTuple):
    """A name of another library: what an import statement says."""

    module: str
    name: str | None
    alias: str


class Module:
    """One module: its text, its definitions by name, its imports by the names that it uses."""

    def __init__(self, name: str, source: str, is_package: bool = False) -> None:
        self.name, self.is_package, self.text, self.tree = name, is_package, Text(source), ast.parse(source)
        self.definitions: dict[str, ast.stmt] = {}
        self.imports: dict[str, Symbol | Imported] = {}
        for node in self.tree.body:
            for defined in _defined(node):
                self.definitions[defined] = node
            if isinstance(node, ast.Import | ast.ImportFrom):
                self.imports |= _imports(node)


def _defined(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]


def _imports(node: ast.Import | ast.ImportFrom) -> dict[str, Symbol | Imported]:
    found: dict[str, Symbol | Imported] = {}
    for alias in node.names:
        own = alias.asname or alias.name
        if isinstance(node, ast.Import):
            found[own] = Imported(alias.name, None, own)
        elif str(node.module).split(".")[0] == PACKAGE:
            found[own] = Symbol(str(node.module), alias.name)
        else:
            found[own] = Imported(str(node.module), alias.name, own)
    return found


@lru_cache(maxsize=256)
def module(name: str) -> Module:
    """A module of the package, its decisions taken.

    Raises: BundleError for one that never runs in plain torch.
    """
    if name.startswith(ABSENT):
        raise BundleError(f"{name} would be needed, which has no part in the plain backend")
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise BundleError(f"{name}: no such module")
    source = Path(spec.origin).read_text(encoding="utf-8")
    is_package = spec.submodule_search_locations is not None
    plain = Module(name, source, is_package)
    return Module(name, folded(source, lambda call: known_call(plain, call)), is_package)


def known_call(where: Module, call: ast.Call) -> Any:
    """What a call in a module returns, `UNKNOWN` where it depends on more than the backend."""
    symbol = meant(where, call.func)
    if not isinstance(symbol, Symbol) or symbol in KNOWN_CALLS:
        return KNOWN_CALLS.get(symbol, UNKNOWN)  # type: ignore[arg-type]
    if symbol.name is None or symbol.module.startswith((*ABSENT, BACKEND)):
        return UNKNOWN
    home = where if symbol.module == where.name else module(symbol.module)
    function = home.definitions.get(symbol.name)
    return UNKNOWN if function is None else constant(function, lambda inner: known_call(home, inner))


def meant(where: Module, node: ast.expr) -> Symbol | Imported | None:
    """What a name, or an attribute of a module, means in a module; None for anything of its own or unknown."""
    if isinstance(node, ast.Attribute):
        owner = meant(where, node.value)
        return found_in(owner.module, node.attr) if isinstance(owner, Symbol) and owner.name is None else None
    if not isinstance(node, ast.Name):
        return None
    if node.id in where.definitions:
        return Symbol(where.name, node.id)
    symbol = where.imports.get(node.id)
    return found_in(symbol.module, symbol.name) if isinstance(symbol, Symbol) and symbol.name else symbol


def found_in(module_name: str, name: str) -> Symbol | Imported:
    """Where `from module_name import name` finds it in the end: packages pass names on.

    Raises: BundleError where it does not.
    """
    inside = f"{module_name}.{name}"
    if module_name.startswith(ABSENT):
        return Symbol(module_name, name)
    home = module(module_name)
    if name in home.definitions:
        return Symbol(module_name, name)
    if (symbol := home.imports.get(name)) is not None:
        return found_in(symbol.module, symbol.name) if isinstance(symbol, Symbol) and symbol.name else symbol
    if inside.startswith(ABSENT) or (home.is_package and find_spec(inside) is not None):
        return Symbol(inside, None)
    raise BundleError(f"{module_name} has no {name}")

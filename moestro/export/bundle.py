"""One file out of many: the classes that a model needs, with everything that they need, as their source has it."""

import ast
import builtins
import re
from collections.abc import Iterable, Mapping

from moestro.export.edits import Edit, edited
from moestro.export.library import BundleError, Imported, Module, Symbol, found_in, meant, module
from moestro.export.needs import Needs, Replacement, members
from moestro.export.scopes import local_names, outer_names

# Shapes stay where they are, for readers; nothing of them is checked.
SHAPES = "jaxtyping"
# Words to type checkers, which have no business in a file that stands alone.
CHECKERS = re.compile(r"  # type: ignore.*$", re.MULTILINE)
SHAPE = '''class _Shaped:
    """Tensors with named dimensions, in annotations: Float[Tensor, "t d"] is Tensor."""

    def __class_getitem__(cls, item):
        return item[0]


'''


def bundled(
    roots: Iterable[Symbol],
    replaced: Mapping[Symbol, Replacement] | None = None,
    elsewhere: Mapping[str, str] | None = None,
) -> str:
    """Source that defines `roots` and needs no module of the package. What each needs is taken, methods that nothing
    calls are left out, and operations are their definitions in plain torch.

    `replaced` gives other source for some symbols; names of the modules in `elsewhere` are imported from what they say.

    Raises: BundleError where that is impossible.
    """
    roots, replaced, elsewhere = list(roots), dict(replaced or {}), dict(elsewhere or {})
    needs = Needs(roots, replaced, elsewhere)
    names = _Names(needs)
    sections = [_section(module(name), needs, names, replaced) for name in _in_import_order(needs)]
    source = "\n\n\n".join([_imports(needs, elsewhere).rstrip(), *(section for section in sections if section)]) + "\n"
    _require_closed(source)
    return source


def _require_closed(source: str) -> None:
    """Raises: BundleError where the source reads a name that it does not define."""
    whole = Module("bundle", source)
    defined = {*whole.definitions, *whole.imports, *dir(builtins)}
    if missing := sorted({name.id for name in outer_names(whole.tree)} - defined):
        raise BundleError(f"the bundle reads what it does not define: {', '.join(missing)}")


class _Names:
    """Under which name each symbol stands in the bundle: its own, but for the second of a name. Aliases, which exist
    because a function has an argument of the same name, become `alias_name`."""

    def __init__(self, needs: Needs) -> None:
        self._of: dict[Symbol, str] = {}
        taken = {imported.alias for imported in needs.imported}
        self._of |= {symbol: str(symbol.name) for symbol in needs.from_elsewhere}
        taken |= {*self._of.values()}
        for symbol in needs.symbols:
            name = str(symbol.name)
            if name in taken:
                name = f"{name}_of_{symbol.module.split('.')[-1]}"
            if name in taken:
                name = f"{symbol.name}_of_{'_'.join(symbol.module.split('.')[1:])}"
            taken.add(name)
            self._of[symbol] = name
        self.aliases: dict[str, Symbol] = {}

    def __getitem__(self, symbol: Symbol) -> str:
        return self._of[symbol]

    def written(self, own: str, symbol: Symbol, asked: str | None) -> str:
        """How a name `own` that means `symbol` is written; `asked` is what the import calls it in its home."""
        if own in (asked, symbol.name):
            return self._of[symbol]
        alias = f"{own}_{self._of[symbol]}"
        self.aliases[alias] = symbol
        return alias


def _in_import_order(needs: Needs) -> list[str]:
    """The modules that something is taken from, each after those that it imports."""
    order: list[str] = []

    def visit(name: str, above: tuple[str, ...] = ()) -> None:
        if name in order or name in above or name in needs.elsewhere:
            return
        for symbol in needs.used_by(name):
            visit(symbol.module, (*above, name))
        order.append(name)

    for symbol in needs.symbols:
        visit(symbol.module)
    return order


def _section(home: Module, needs: Needs, names: _Names, replaced: Mapping[Symbol, Replacement]) -> str:
    """What is taken from one module, in its order."""
    taken, seen = [], set()
    for name, node in home.definitions.items():
        symbol = Symbol(home.name, name)
        if symbol not in needs.symbols or id(node) in seen:
            continue
        seen.add(id(node))
        before = set(names.aliases)
        text = replaced[symbol].text.strip() if symbol in replaced else _definition(home, node, needs, names)
        aliases = [f"{alias} = {names[names.aliases[alias]]}" for alias in names.aliases if alias not in before]
        short = not isinstance(node, ast.FunctionDef | ast.ClassDef)
        taken.append("\n".join([*aliases, *([""] * 2 if aliases and not short else []), text]))
    return "\n\n\n".join([f"# {home.name}", *taken]).replace("\n\n\n", "\n\n", 1) if taken else ""


def _definition(home: Module, node: ast.stmt, needs: Needs, names: _Names) -> str:
    text = home.text
    absent = needs.left_out(home.name, node)
    edits = [text.without(method) for method in absent]
    if isinstance(node, ast.FunctionDef | ast.ClassDef) and names[Symbol(home.name, node.name)] != node.name:
        first = text.line(node.lineno) + node.col_offset + (len("class ") if isinstance(node, ast.ClassDef) else 4)
        edits.append(Edit(first, first + len(node.name), names[Symbol(home.name, node.name)]))
    for name in _targets(node):
        edits.append(Edit(text.start(name), text.stop(name), names[Symbol(home.name, name.id)]))
    for part in members(node):
        for used in outer_names(part) if part not in absent else ():
            edits += _renamed(home, used, node, names)
    first = text.line(text.first_line(node))
    return CHECKERS.sub("", edited(text.source, edits, first, text.stop(node))).rstrip()


def _targets(node: ast.stmt) -> list[ast.Name]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [name for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]


def _renamed(home: Module, used: ast.Name, node: ast.stmt, names: _Names) -> list[Edit]:
    """The edit that gives a name its name in the bundle; of an attribute of a module the whole becomes one name."""
    symbol = meant(home, used)
    if not isinstance(symbol, Symbol):
        return []
    if symbol.name is not None:
        asked = home.imports.get(used.id)
        new = names.written(used.id, symbol, asked.name if isinstance(asked, Symbol) else used.id)
        _check_unshadowed(new, used.id, node)
        return [] if new == used.id else [Edit(home.text.start(used), home.text.stop(used), new)]
    whole = _attribute_of(used, node)
    inner = found_in(symbol.module, whole.attr)
    if not isinstance(inner, Symbol):
        raise BundleError(f"{home.name}: {symbol.module}.{whole.attr} is of another library")
    return [Edit(home.text.start(whole), home.text.stop(whole), names[inner])]


def _attribute_of(used: ast.Name, node: ast.stmt) -> ast.Attribute:
    for outer in ast.walk(node):
        if isinstance(outer, ast.Attribute) and outer.value is used:
            return outer
    raise BundleError(f"the module {used.id!r} is used as a value on line {used.lineno}")


def _check_unshadowed(new: str, old: str, node: ast.stmt) -> None:
    """Raises: BundleError where a function has something of its own under the new name."""
    if new == old:
        return
    for inner in ast.walk(node):
        if isinstance(inner, ast.FunctionDef | ast.Lambda) and new in local_names(inner):
            raise BundleError(f"{new} would be hidden by a name of {getattr(inner, 'name', 'a lambda')}")


def _imports(needs: Needs, elsewhere: Mapping[str, str]) -> str:
    plain = sorted({item for item in needs.imported if item.name is None})
    lines = [f"import {item.module}" + (f" as {item.alias}" if item.alias != item.module else "") for item in plain]
    origins: dict[str, set[str]] = {}
    for item in needs.imported:
        if item.name is not None and item.module != SHAPES:
            said = item.name if item.name == item.alias else f"{item.name} as {item.alias}"
            origins.setdefault(item.module, set()).add(said)
    for symbol in needs.from_elsewhere:
        origins.setdefault(elsewhere[symbol.module], set()).add(str(symbol.name))
    for origin in sorted(origins, key=lambda origin: (origin.startswith("."), origin)):
        lines.append(f"from {origin} import {', '.join(sorted(origins[origin]))}")
    shapes = sorted({item.alias for item in needs.imported if item.module == SHAPES})
    return "\n".join(lines) + ("\n\n\n" + SHAPE + " = ".join([*shapes, "_Shaped"]) if shapes else "")


__all__ = ["BundleError", "Imported", "Replacement", "Symbol", "bundled"]

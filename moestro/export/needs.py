"""What a set of classes needs: definitions, imports, and which methods can ever be called."""

import ast
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel

from moestro.export.library import Imported, Module, Symbol, found_in, meant, module
from moestro.export.scopes import FUNCTIONS, outer_names

# Called by name: an attribute that is asked for in words.
ASKED = {"getattr", "hasattr", "setattr"}
# Methods that torch and transformers call by themselves.
CALLED = {*dir(torch.autograd.Function), *dir(PreTrainedModel), *dir(PreTrainedConfig), *dir(GenerationMixin)}


class Replacement(NamedTuple):
    """Source in place of a definition, and what it uses."""

    text: str
    uses: tuple[Symbol | Imported, ...] = ()


class Needs:
    """The closure of `roots`: `symbols` of the package, names `imported` from other libraries and `from_elsewhere`.

    A method is needed where it is special, overrides one that torch or transformers call, belongs to a root, or where
    anything that is needed mentions its name: so no method that could be called is left out.
    """

    def __init__(
        self, roots: Iterable[Symbol], replaced: Mapping[Symbol, Replacement], elsewhere: Mapping[str, str]
    ) -> None:
        self.roots, self.replaced, self.elsewhere = set(roots), replaced, elsewhere
        self.symbols: dict[Symbol, None] = {}
        self.imported: set[Imported] = set()
        self.from_elsewhere: set[Symbol] = set()
        self._mentioned: set[str] = set()
        self._used_by: dict[str, dict[Symbol, None]] = {}
        self._looked_at: set[int] = set()
        for symbol in sorted(self.roots):
            self._add(symbol)
        size = (-1, -1)
        # names that are mentioned grow, so methods of what is there already may be needed later
        while size != (size := (len(self._looked_at), len(self.symbols))):
            for symbol in list(self.symbols):
                self._look(symbol)

    def used_by(self, name: str) -> list[Symbol]:
        """What the needed part of a module uses of others, in its order."""
        return list(self._used_by.get(name, ()))

    def left_out(self, home: str, node: ast.stmt) -> list[ast.stmt]:
        """The methods of a definition that nothing calls."""
        if not isinstance(node, ast.ClassDef) or Symbol(home, node.name) in self.roots:
            return []
        return [item for item in node.body if isinstance(item, FUNCTIONS) and not self._callable(item.name)]

    def _callable(self, name: str) -> bool:
        return (name.startswith("__") and name.endswith("__")) or name in CALLED or name in self._mentioned

    def _add(self, symbol: Symbol | Imported) -> None:
        if isinstance(symbol, Imported):
            self.imported.add(symbol)
        elif symbol.module in self.elsewhere:
            self.from_elsewhere.add(symbol)
        elif symbol.name is not None and symbol not in self.symbols:
            self.symbols[symbol] = None

    def _look(self, symbol: Symbol) -> None:
        """Add what the parts of a definition that are needed by now use."""
        home = module(symbol.module)
        if symbol in self.replaced:
            for used in self.replaced[symbol].uses:
                self._use(home, used)
            return
        node = home.definitions[str(symbol.name)]
        absent = self.left_out(home.name, node)
        for part in members(node):
            if id(part) not in self._looked_at and part not in absent:
                self._looked_at.add(id(part))
                self._look_at(home, part)

    def _look_at(self, home: Module, part: ast.AST) -> None:
        for name in outer_names(part):
            symbol = meant(home, name)
            if symbol is not None and not (isinstance(symbol, Symbol) and symbol.name is None):
                self._use(home, symbol)
        for node in ast.walk(part):
            if isinstance(node, ast.Attribute):
                self._mentioned.add(node.attr)
                owner = meant(home, node.value) if isinstance(node.value, ast.Name) else None
                if isinstance(owner, Symbol) and owner.name is None:
                    self._use(home, found_in(owner.module, node.attr))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ASKED:
                self._mentioned |= {str(item.value) for item in node.args if isinstance(item, ast.Constant)}

    def _use(self, home: Module, symbol: Symbol | Imported) -> None:
        self._add(symbol)
        if isinstance(symbol, Symbol) and symbol.module != home.name:
            self._used_by.setdefault(home.name, {})[symbol] = None


def members(node: ast.stmt) -> Iterator[ast.AST]:
    """A definition, or of a class its head and its members one by one."""
    if not isinstance(node, ast.ClassDef):
        yield node
        return
    yield from (*node.bases, *node.keywords, *node.decorator_list, *node.body)

"""One file out of many modules: small packages with known answers, and what the file of a real model holds."""

import ast
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from moestro.export import library
from moestro.export.bundle import BundleError, Replacement, Symbol, bundled
from moestro.export.edits import Edit, edited
from moestro.export.folding import UNKNOWN, folded
from moestro.export.remote_code import remote_code
from moestro.export.scopes import outer_names
from tests.export.conftest import hosted

FILES = {
    "__init__.py": "",
    "ops/__init__.py": "from small.ops.add import add\n",
    "ops/backend.py": "def active():\n    return 'fast'\ndef runs_native(x):\n    return True\n",
    "ops/native.py": "def add(a, b):\n    return -1\n",
    "ops/slow.py": "def add(a, b):\n    return a + b\n",
    "ops/add.py": '''
from small.ops import backend, native, slow

# how often
TIMES = 2


def add(a, b):
    """a + b."""
    if _fast(a):
        return native.add(a, b)
    kind = "definition" if backend.active() == "reference" else "other"
    if backend.active() == "reference":
        total = slow.add(a, b)
    else:
        total = native.add(a, b)
    return total, kind, TIMES
    return None


def _fast(a):
    if a is None:
        return False
    return a > 0 and backend.runs_native(a)
''',
    "shapes.py": '''
"""Shapes."""
import math
from dataclasses import dataclass

from small.ops import add
from small.names import kind as find


@dataclass(frozen=True)
class Point:
    x: float = 0.0

    # the distance
    def far(self) -> float:
        return math.sqrt(self.x)

    def never(self) -> "Unknown":
        return Unknown()


class Box:
    def __init__(self, kind):
        self.kind, self.point = find(kind), Point(4.0)

    def size(self):
        zero = 0
        return add(1, zero), self.point.far(), [add for add in (1, 2)]

    def _unused(self):
        return add(3, 4)
''',
    "names.py": "def kind(kind):\n    return f'kind {kind}'\ndef add(a):\n    return a\nTABLE = {'add': add}\n",
    "roots.py": """
from small.shapes import Box
from small.names import TABLE


class Root:
    def made(self):
        return Box("a").size(), TABLE["add"](5), Box("b").kind
""",
}
BOX = "class Box:\n    def size(self):\n        return "


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with what makes bundling hard: twins of a name, aliases, modules as names, compiled operations."""
    for name, text in FILES.items():
        file = tmp_path / "small" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(library, "PACKAGE", "small")
    monkeypatch.setattr(library, "BACKEND", "small.ops.backend")
    calls = {("small.ops.backend", "active"): "reference", ("small.ops.backend", "runs_native"): False}
    monkeypatch.setattr(library, "KNOWN_CALLS", calls)
    monkeypatch.setattr(library, "ABSENT", ("small.ops.native",))
    importlib.invalidate_caches()
    library.module.cache_clear()
    yield tmp_path / "small"
    library.module.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "small"]:
        del sys.modules[name]


def run(source: str) -> dict[str, Any]:
    scope: dict[str, Any] = {"__name__": "standalone"}
    exec(compile(source, "bundle.py", "exec"), scope)
    return scope


def test_a_bundle_computes_by_the_definition_without_the_package(small: Path) -> None:
    source = bundled([Symbol("small.roots", "Root")])
    assert "small." not in "\n".join(line for line in source.splitlines() if not line.startswith("#"))
    expected = (((1, "definition", 2), 2.0, [1, 2]), 5, "kind b")
    assert run(source)["Root"]().made() == expected


def test_a_bundle_leaves_out_what_nothing_calls_and_keeps_comments(small: Path) -> None:
    source = bundled([Symbol("small.roots", "Root")])
    for absent in ("native", "_fast", "never", "_unused", "backend"):
        assert absent not in source
    assert "# how often" in source and "# the distance" in source and '"""a + b."""' in source


def test_twins_of_a_name_get_names_of_their_own(small: Path) -> None:
    scope = run(bundled([Symbol("small.roots", "Root")]))
    functions = {name for name, value in scope.items() if callable(value) and name.startswith("add")}
    assert len(functions) == 3


def test_replaced_definitions_and_modules_elsewhere(small: Path) -> None:
    new = Replacement("def kind(name):\n    return len(name)\n")
    source = bundled([Symbol("small.roots", "Root")], {Symbol("small.names", "kind"): new}, {"small.ops.add": ".sums"})
    assert "from .sums import add" in source and "class Root" in source and "len(name)" in source


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("shapes.py", f"from small.ops import native\n{BOX}native.add(1, 2)\n", "no part in the plain"),
        ("shapes.py", f"from small.ops import slow\n{BOX}slow\n", "as a value"),
        ("shapes.py", f"{BOX}nowhere\n", "does not define: nowhere"),
        ("shapes.py", f"from small.names import kind as find\n{BOX}find(lambda find_kind: 1)\n", "would be hidden"),
        ("roots.py", "from small.shapes import Circle\nclass Root:\n    made = Circle\n", "small.shapes has no Circle"),
    ],
)  # fmt: skip
def test_what_cannot_be_taken_out_is_an_error(small: Path, file: str, text: str, message: str) -> None:
    (small / file).write_text(text)
    with pytest.raises(BundleError, match=message):
        bundled([Symbol("small.roots", "Root")])


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = f() and y", "x = False"),
        ("x = not f() or y", "x = True"),
        ("if f():\n    a\nelse:\n    b\n    c\nd", "b\nc\nd"),
        ("if f():\n    a\nd", "d"),
        ("if f() == False:\n    if y:\n        a\nd", "if y:\n    a\nd"),
        ("x = é if f() else ü", "x = ü"),
        ("def g():\n    return 1\n    a\nb", "def g():\n    return 1\nb"),
        ("if y or f():\n    a", "if y or f():\n    a".replace("f()", "False")),
    ],
)
def test_decisions_are_taken(source: str, expected: str) -> None:
    def known(call: ast.Call) -> Any:
        return False if isinstance(call.func, ast.Name) and call.func.id == "f" else UNKNOWN

    assert folded(source, known) == expected


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("def f(a, b=c):\n    d = a + e\n    return [g for g in d if h]", "c e h"),
        (
            "class A(B):\n    x = 1\n    y = x\n    def f(self, z: C = x) -> D:\n        return x, lambda q: q + w",
            "B C D w x",
        ),
        ("try:\n    a\nexcept E as e:\n    e\nwith o() as p:\n    p", "E a e o p"),
        ("def f():\n    import os\n    for i, (j, k) in m:\n        os, i, j, k\n    def g(): return i, n", "m n"),
    ],
)
def test_names_that_mean_something_outside(source: str, names: str) -> None:
    assert sorted({name.id for name in outer_names(ast.parse(source))}) == names.split()


def test_edits_inside_others_give_way() -> None:
    assert edited("abcdefgh", [Edit(1, 2, "X"), Edit(3, 7, "-"), Edit(4, 5, "Y")]) == "aXc-h"
    assert edited("abcdefgh", [Edit(6, 9, "!")], 2, 7) == "cdef!"


def test_the_file_of_hmoe_holds_hmoe_and_says_where_it_comes_from() -> None:
    code = remote_code(hosted("hmoe").config.construction)
    assert sorted(code) == ["configuration_moestro.py", "modeling_moestro.py"]
    modeling = code["modeling_moestro.py"]
    tree = ast.parse(modeling)
    classes = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    assert {"MoestroForCausalLM", "MoestroModel", "FFNBank", "TopK"} <= classes
    assert not classes & {"ProductKeyRouter", "SingletonBank", "TopP", "StratifiedLayer", "Cost"}
    methods = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert {"_init_weights", "get_expanded_tied_weights_keys", "forward"} <= methods
    assert not methods & {"reindex", "flops", "norms", "own_parameters"}
    docstring = ast.get_docstring(tree) or ""
    assert "moestro 0" in docstring and "Apache License" in docstring and "type: ignore" not in modeling
    roots = {alias.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    roots |= {(n.module or "").split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.level}
    assert roots <= {"torch", "transformers", *sys.stdlib_module_names}
    assert max(len(line) for line in modeling.splitlines()) <= 140 and len(modeling.splitlines()) < 1800

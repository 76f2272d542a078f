"""The house rules of CONTRIBUTING.md and docs/house.md that a program can check."""

import ast
import fnmatch
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

import moestro
from tests.conftest import CHECKED, ROOT

PACKAGE = sorted((ROOT / "moestro").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
BENCH = sorted((ROOT / "bench").rglob("*.py"))
# what an install puts beside the package
START_UP = sorted((ROOT / "start_up").rglob("*.py"))
SHIPPED = [*PACKAGE, *BENCH, *START_UP]
EVERY = [*SHIPPED, *TESTS]
# floors 0-3 may be told of autocast in one place
INNER = [path for path in PACKAGE if path.relative_to(ROOT / "moestro").parts[0].removesuffix(".py") in CHECKED]
KNOWS_AUTOCAST = {"moestro/ops/precision.py"}
CORE = {"torch", "numpy", "safetensors", "yaml", "rich", "tokenizers", "jaxtyping", "moestro"}
# Packages of floors above the core that stand on another library; the verbs import them when they are called.
STANDS_ON = {
    "hf": {"transformers", "huggingface_hub"},
    "export": {"transformers", "huggingface_hub"},
    "harness": {"lm_eval"},
    "serve": {"fastapi", "pydantic", "starlette", "uvicorn"},
}
FILE_LINES, TEST_FILE_LINES, FUNCTION_LINES, INIT_ARGUMENTS = 300, 400, 45, 8
BROAD = {"Exception", "BaseException"}
BANNED_NAME = re.compile(r"^common$|(^|_)(utils?|helpers?|misc|managers?|base2)(_|$)|Utils|Helper|Manager")
# Names of the workshop in which this was built, in pieces, so that this file does not name them itself.
WORKPLACE = [
    "/wo" + "rk/",
    "far" + "m-",
    "issues " + "show",
    "duplicates " + "--",
    "/opt/" + "wheels",
    "/opt/" + "pypi",
]
HOSTS = ["pypi" + ".org", "python" + "hosted", "download.py" + "torch", "conda" + ".anaconda"]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(text(path), filename=str(path))


@cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(parsed(path)))


@cache
def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in nodes(path) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def imports(some: Iterable[ast.AST]) -> Iterator[str]:
    """Full names of the modules that nodes import."""
    for node in some:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield f"{node.module}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported(path: Path) -> set[str]:
    """First names of the modules that a file imports anywhere."""
    return {module.split(".")[0] for module in imports(nodes(path))}


def imported_first(path: Path) -> set[str]:
    """First names of the modules imported when the file is, not inside a function."""
    inside = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    outside = (node for top in parsed(path).body if not isinstance(top, inside) for node in ast.walk(top))
    return {module.split(".")[0] for module in imports(outside)}


def tracked() -> list[Path]:
    """The files of the repository, as git knows them, or all text files where there is no git."""
    if (ROOT / ".git").exists():
        listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True)
        return [ROOT / file for file in listed.stdout.split("\0") if file and (ROOT / file).is_file()]
    return [path for path in ROOT.rglob("*") if path.is_file() and not {".venv", "runs"} & set(path.parts)]


def test_the_walk_finds_the_files() -> None:
    assert len(PACKAGE) > 40 and len(TESTS) > 20 and len(INNER) > 15
    assert {"moestro/ops/precision.py", "moestro/routing/decisions.py", "moestro/cost.py"} <= {
        name(path) for path in INNER
    }


def where(path: Path, node: ast.stmt | ast.expr | ast.excepthandler) -> str:
    return f"{name(path)}:{node.lineno}"


def test_files_are_short() -> None:
    most = {path: TEST_FILE_LINES if path in TESTS else FILE_LINES for path in EVERY}
    assert not [name(path) for path in EVERY if len(text(path).splitlines()) > most[path]]


def length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    docstring = node.body[0] if ast.get_docstring(node, clean=False) is not None else None
    lines = (docstring.end_lineno or 0) - docstring.lineno + 1 if docstring else 0
    return (node.end_lineno or 0) - node.lineno + 1 - lines


def test_functions_are_short() -> None:
    long = [where(p, f) for p in SHIPPED for f in functions(p) if length(f) > FUNCTION_LINES]
    assert not long, f"longer than {FUNCTION_LINES} lines without their docstrings"


def arguments(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    return [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]


def test_constructors_take_few_arguments() -> None:
    made = [(path, node) for path in PACKAGE for node in functions(path) if node.name == "__init__"]
    assert not [where(path, node) for path, node in made if len(arguments(node)) - 1 > INIT_ARGUMENTS]


def test_names_say_something() -> None:
    for path in EVERY:
        classes = [node.name for node in nodes(path) if isinstance(node, ast.ClassDef)]
        words = (*path.relative_to(ROOT).with_suffix("").parts, *classes, *(node.name for node in functions(path)))
        assert not [word for word in words if BANNED_NAME.search(word)], name(path)


def test_annotations_are_not_postponed() -> None:
    assert not [name(path) for path in EVERY if "__future__.annotations" in imports(nodes(path))]


def package_of(path: Path) -> str:
    return path.relative_to(ROOT / "moestro").parts[0]


def test_the_package_imports_only_its_core_dependencies() -> None:
    for path in PACKAGE:
        # kernels are functions of their module; `ops.triton_ffn`, which imports these modules when called, is not one
        kernels = {"triton"} if path.name.startswith(("triton_ffn_", "triton_peer_")) else set()
        allowed = CORE | kernels | STANDS_ON.get(package_of(path), set()) | set(sys.stdlib_module_names)
        assert imported_first(path) <= allowed, name(path)


def test_what_starts_with_python_knows_the_standard_library_alone() -> None:
    for path in START_UP:
        assert imported(path) <= {"moestro"} | set(sys.stdlib_module_names), name(path)


def test_a_library_is_known_in_the_packages_that_stand_on_it() -> None:
    for path in PACKAGE:
        elsewhere = set().union(*STANDS_ON.values()) - STANDS_ON.get(package_of(path), set())
        assert not imported(path) & elsewhere, name(path)


def test_the_command_line_starts_without_the_libraries_of_single_verbs() -> None:
    code = "import sys, moestro.cli; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not set(loaded) & set().union(*STANDS_ON.values())


def test_nothing_is_unpickled() -> None:
    for path in PACKAGE:
        assert not {"pickle", "dill", "joblib", "shelve", "marshal"} & imported(path), name(path)
        assert not re.search(r"torch\.(load|save)\(", text(path)), name(path)


def test_no_bare_asserts() -> None:
    found = [where(path, node) for path in SHIPPED for node in nodes(path) if isinstance(node, ast.Assert)]
    assert not found, "asserts vanish under -O; raise an error that says what was wrong"


def test_no_error_is_swallowed() -> None:
    caught = [(path, node) for path in EVERY for node in nodes(path) if isinstance(node, ast.ExceptHandler)]
    for path, node in caught:
        broad = node.type is None or (isinstance(node.type, ast.Name) and node.type.id in BROAD)
        does_nothing = all(isinstance(line, ast.Pass | ast.Continue) for line in node.body)
        assert not (broad and does_nothing), where(path, node)
        assert node.type is not None, f"{where(path, node)}: bare except"


def test_inner_floors_know_no_devices() -> None:
    for path in INNER:
        assert not re.search(r"torch\.distributed|\.cuda\b|\byaml\b", text(path)), name(path)
        assert name(path) in KNOWS_AUTOCAST or not re.search(r"torch\.\w*autocast", text(path)), name(path)


def test_references_do_not_know_the_package() -> None:
    references = sorted((ROOT / "tests" / "reference").rglob("*.py"))
    assert len(references) > 5
    for path in references:
        assert imported(path) <= {"torch"} | set(sys.stdlib_module_names), name(path)


def test_docstrings_name_tests_that_are_there() -> None:
    """Tables of a system's checks say where each is tested; a star, or dots behind an underscore, are the rest."""
    known = {node.name for path in TESTS for node in functions(path)} | {path.stem for path in TESTS}
    for path in TESTS:
        for node in [parsed(path), *functions(path)]:
            for word in re.findall(r"\btest_[a-z0-9_*]+", ast.get_docstring(node) or ""):
                pattern = word + "*" if word.endswith("_") else word
                assert word in known or fnmatch.filter(known, pattern), f"{name(path)} names {word}, which is nowhere"


def public(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """Functions and methods without an underscore, of classes without one."""
    for node in tree.body:
        inside = node.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_") else [node]
        yield from (item for item in inside if isinstance(item, ast.FunctionDef) and not item.name.startswith("_"))


def test_public_functions_are_annotated() -> None:
    offered = [(path, node) for path in PACKAGE for node in public(parsed(path))]
    for path, node in offered:
        bare = [a.arg for a in arguments(node) if a.annotation is None and a.arg not in ("self", "cls")]
        assert not bare and node.returns is not None, f"{where(path, node)} {node.name}: {bare or 'returns'}"


def test_modules_say_what_they_are() -> None:
    assert not [name(path) for path in PACKAGE if not ast.get_docstring(parsed(path))]


def test_notes_to_self_name_an_issue() -> None:
    unnumbered = re.compile(r"# *(TODO|FIXME|XXX|HACK)\b(?!\(#\d+\))")
    assert not [name(path) for path in EVERY if unnumbered.search(text(path))]


def test_documents_are_short() -> None:
    for file, lines in {"README.md": 150, "CONTRIBUTING.md": 80}.items():
        assert len((ROOT / file).read_text(encoding="utf-8").splitlines()) <= lines, file


def test_continuous_integration_runs_the_readme_s_test_command() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert re.search(r"^\s*make test\b", readme, re.MULTILINE)
    assert "make test" in script and "make lint" in script and "set -euo pipefail" in script


def test_the_version_is_written_twice_alike() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == moestro.__version__


def test_every_dependency_has_an_exact_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *(item for extra in project["optional-dependencies"].values() for item in extra),
    ]
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", pin) for pin in pins)
    names = {pin.split("==")[0].lower().replace("_", "-") for pin in pins}
    missing = {re.split(r"[\[>=<]", item)[0].lower() for item in wanted} - names - {"moestro"}
    assert not missing and "torch>=2.11" in wanted


def made(target: str) -> list[str]:
    """What `make target` would run where nothing is set up yet."""
    if shutil.which("make") is None:
        pytest.skip("no make on this machine")
    command = ["make", "-n", target, "VENV=/nowhere/venv"]
    # a make that runs these tests would hand its own flags down
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=clean)
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("target", "last"),
    [("test", "-m pytest"), ("demo", "moestro compare recipes/compare/first_look.yaml"), ("lint", "lint-imports")],
)
def test_each_target_sets_itself_up_torch_first(target: str, last: str) -> None:
    lines = made(target)
    installs = [line for line in lines if "pip install" in line]
    assert installs[0].endswith("constraints.txt  torch") and all("-c constraints.txt" in line for line in installs)
    assert any("-m venv" in line for line in lines[: lines.index(installs[0])])
    assert last in lines[-1] and lines.index(installs[-1]) < len(lines) - 1


def test_nothing_names_the_workshop_or_a_package_index() -> None:
    found = []
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{name(path)}: {word}" for word in (*WORKPLACE, *HOSTS) if word in text]
    assert not found

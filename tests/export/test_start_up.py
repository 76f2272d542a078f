"""An installed moestro is known to transformers before anything imports it: what Python runs when it starts."""

import json
import os
import pkgutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import warnings
from collections.abc import Callable, Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import torch
from safetensors.torch import save_file

from moestro.export import MoestroConfig, open_model
from moestro.export.folder import export_run
from tests.conftest import ROOT
from tests.export.conftest import some_tokens

PLAIN = """
import sys
from transformers import AutoModelForCausalLM
assert not [name for name in sys.modules if name.split(".")[0] == "moestro"], "imported before it is asked for"
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model).__module__ == "moestro.export.modeling"
import moestro.export, torch
from safetensors.torch import load_file
again = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(again) is type(model) is moestro.export.MoestroForCausalLM
torch.set_num_threads(1)
expected = load_file(sys.argv[2])
with torch.no_grad():
    assert torch.equal(again(expected["tokens"]).logits, expected["logits"])
"""
# what a program does first
FIRST = {
    "library": "import transformers; model = transformers.AutoModelForCausalLM.from_pretrained(folder)",
    "base": "from transformers import AutoModel; model = AutoModel.from_pretrained(folder)",
    "export": "import moestro.export; from transformers import AutoModel; model = AutoModel.from_pretrained(folder)",
    "moestro": "import moestro; from transformers import AutoModel; model = AutoModel.from_pretrained(folder)",
    "hf": "import moestro.hf; from transformers import AutoModel; model = AutoModel.from_pretrained(folder)",
    "tokenizer": "from transformers import AutoTokenizer, AutoModel; AutoTokenizer.from_pretrained(folder)\n"
    "model = AutoModel.from_pretrained(folder)",
    "pipeline": "from transformers import pipeline; model = pipeline('text-generation', folder).model",
    "trusting": "from transformers import AutoModel\nmodel = AutoModel.from_pretrained(folder, trust_remote_code=True)",
    "configuration": "from transformers import AutoConfig, AutoModel; config = AutoConfig.from_pretrained(folder)\n"
    "assert type(AutoConfig.for_model('moestro', construction=config.construction)) is type(config)\n"
    "model = AutoModel.from_config(config)",
    "mapping": "from transformers import CONFIG_MAPPING, AutoModel\n"
    "model = AutoModel.from_config(CONFIG_MAPPING['moestro'].from_pretrained(folder))",
    # transformers puts another module in its own place while it is imported, which threads that wait for it do not see
    "threads": "import threading, transformers\nfrom concurrent.futures import ThreadPoolExecutor\n"
    "start = threading.Barrier(4)\ndef load(number):\n    start.wait()\n    from transformers import AutoModel\n"
    "    return AutoModel.from_pretrained(folder)\n"
    "with ThreadPoolExecutor(4) as pool:\n    model, *others = pool.map(load, range(4))\n"
    "assert {type(other) for other in others} == {type(model)}",
}
EXAMPLE = """
class AutoConfig:
    told = []
    @classmethod
    def register(cls, name, value, exist_ok):
        cls.told.append((name, value))
"""


def installed_files() -> dict[str, Path]:
    """What the build puts beside the package, by its place there."""
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    return {place: ROOT / source for source, place in wheel["force-include"].items()}


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment in which this checkout is, as an editable install puts it there."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    paths = {"base": str(folder), "platbase": str(folder)}
    packages = Path(sysconfig.get_path("purelib", "venv", paths))
    for place, source in installed_files().items():
        (packages / place).write_bytes(source.read_bytes())
    # everything else comes from where these tests run; what would start by itself there does not
    (packages / "_paths.pth").write_text(f"{ROOT}\n{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    return Path(sysconfig.get_path("scripts", "venv", paths)) / "python"


def said(python: Path, *command: str, home: Path, **settings: str) -> str:
    """What a process prints that is told of nothing but that environment."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MOESTRO"))}
    kept |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **settings}
    options: dict[str, Any] = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL, "timeout": 600}
    done = subprocess.run([python, "-I", *command], env=kept, cwd=home, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def exported(run_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "hmoe"
    export_run(run_of("hmoe"), folder)
    return folder


def test_a_folder_loads_by_its_name_where_the_package_is_installed(
    python: Path, exported: Path, tmp_path: Path
) -> None:
    tokens = some_tokens(2, 8)
    with torch.no_grad():
        save_file({"tokens": tokens, "logits": open_model(exported).model(tokens).logits}, tmp_path / "expected.st")
    said(python, "-c", PLAIN, str(exported), str(tmp_path / "expected.st"), home=tmp_path)


def test_python_starts_with_one_small_module_more(python: Path, tmp_path: Path) -> None:
    program = "import sys; print(*(type(finder).__module__ for finder in sys.meta_path))"
    assert said(python, "-c", program, home=tmp_path).split().count("_moestro_start_up") == 1
    assert "_moestro_start_up" not in said(python, "-c", program, home=tmp_path, MOESTRO_START_UP="off").split()
    # without what else starts here
    folder = str(installed_files()["moestro.pth"].parent)
    program = "import os, sys; before = {*sys.modules}; sys.path.insert(0, sys.argv[1]); import _moestro_start_up\n"
    program += "_moestro_start_up.install(); print(*{*sys.modules} - before)"
    assert said(python, "-S", "-B", "-c", program, folder, home=tmp_path).split() == ["_moestro_start_up"]


def test_later_pythons_start_the_same() -> None:
    """PEP 829: the name of a function in place of a line of code."""
    files = installed_files()
    module, function = files["moestro.start"].read_text().strip().split(":")
    assert files["moestro.pth"].read_text() == f"import {module}; {module}.{function}()\n"
    assert f"{module}.py" in files and "\ndef install() -> None:\n" in files[f"{module}.py"].read_text()


@pytest.fixture
def start_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module, watching for one of our own in place of that of transformers."""
    spec = spec_from_file_location("a_start_up", installed_files()["_moestro_start_up.py"])
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "watched_example.py").write_text(EXAMPLE)
    monkeypatch.setattr(module, "WATCHED", "watched_example")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.delenv(module.SWITCH, raising=False)
    # as in a program that has not imported it
    monkeypatch.delitem(sys.modules, "moestro.export")
    yield module
    sys.modules.pop("watched_example", None)


def watched() -> Any:
    return __import__("watched_example")


def test_the_stand_in_is_registered_when_the_module_is_imported(start_up: Any) -> None:
    start_up.install()
    start_up.install()
    assert sum(isinstance(finder, start_up.Watch) for finder in sys.meta_path) == 1
    module = watched()
    assert module.AutoConfig.told == [("moestro", start_up.MoestroConfig)]
    # nothing of the watch is left in the module
    assert module.__loader__ is module.__spec__.loader and type(module.__loader__).__name__ == "SourceFileLoader"
    assert not start_up.MoestroConfig.__module__.startswith("transformers.")


def test_a_module_that_is_there_already_is_told_at_once(start_up: Any) -> None:
    module = watched()
    start_up.install()
    assert module.AutoConfig.told == [("moestro", start_up.MoestroConfig)]
    assert not any(isinstance(finder, start_up.Watch) for finder in sys.meta_path)


def test_the_package_itself_is_not_replaced(start_up: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "moestro.export", sys)
    start_up.install()
    assert watched().AutoConfig.told == []


def test_it_can_be_switched_off(start_up: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESTRO_START_UP", "off")
    start_up.install()
    assert watched().AutoConfig.told == []


class Absent:
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "moestro":
            raise ModuleNotFoundError(name)


@pytest.mark.parametrize("how", ["refused", "a folder without a package"])
def test_without_the_package_nothing_is_registered(
    how: str, start_up: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_up.install()
    monkeypatch.delitem(sys.modules, "moestro")
    if how == "refused":
        sys.meta_path.insert(0, Absent())  # type: ignore[arg-type]
    else:
        (tmp_path / "moestro").mkdir()
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert watched().AutoConfig.told == []


def test_what_goes_wrong_is_told_and_stops_nobody(start_up: Any, tmp_path: Path) -> None:
    (tmp_path / "watched_example.py").write_text("AutoConfig = None\nhere = 1\n")
    start_up.install()
    with pytest.warns(RuntimeWarning, match="transformers was not told of moestro's models: AttributeError"):
        assert watched().here == 1


def test_an_error_of_the_module_is_its_own(start_up: Any, tmp_path: Path) -> None:
    (tmp_path / "watched_example.py").write_text("raise OSError('its own')\n")
    start_up.install()
    with pytest.raises(OSError, match="its own"):
        watched()
    assert "watched_example" not in sys.modules
    (tmp_path / "watched_example.py").write_text(EXAMPLE + "\n# repaired\n")
    assert len(watched().AutoConfig.told) == 1


def test_the_stand_in_makes_what_the_package_makes(start_up: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "moestro.export", pkgutil.resolve_name("moestro.export"))
    for made in (start_up.MoestroConfig(), start_up.MoestroConfig.from_dict({"format_version": 1})):
        assert type(made) is MoestroConfig
    monkeypatch.setitem(sys.modules, "moestro.export", None)
    with pytest.raises(ImportError, match="installed and cannot be imported.*MOESTRO_START_UP=off"):
        start_up.MoestroConfig.from_dict({})


@pytest.mark.slow
@pytest.mark.parametrize("first", FIRST)
def test_whatever_a_program_does_first(first: str, python: Path, exported: Path, tmp_path: Path) -> None:
    program = f"import sys; folder = sys.argv[1]\n{FIRST[first]}\nprint(type(model).__module__)"
    assert said(python, "-c", program, str(exported), home=tmp_path).split() == ["moestro.export.modeling"]


@pytest.mark.slow
def test_lm_eval_s_own_command_scores_a_folder(python: Path, exported: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"page": "the quick brown fox"}) + "\n")
    task = {"task": "page", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "page"}
    task |= {"dataset_path": "json", "dataset_kwargs": {"data_files": {"validation": str(tmp_path / "rows.jsonl")}}}
    task |= {"validation_split": "validation", "metric_list": [{"metric": "bits_per_byte"}]}
    # JSON is YAML
    (tmp_path / "page.yaml").write_text(json.dumps(task))
    options = ["--tasks", "page", "--include_path", str(tmp_path), "--device", "cpu", "--batch_size", "1"]
    model = ["--model", "hf", "--model_args", f"pretrained={exported}"]
    assert "bits_per_byte" in said(python, "-m", "lm_eval", *model, *options, home=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["build_wheel", "build_editable"])
def test_wheels_of_both_kinds_have_the_files(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="what builds the package is not installed here")
    program = f"import sys; from hatchling.build import {kind} as build; build(sys.argv[1])"
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    with ZipFile(wheel) as archive:
        for place, source in installed_files().items():
            assert archive.read(place) == source.read_bytes()
        assert not [name for name in archive.namelist() if name.startswith("start_up/")]

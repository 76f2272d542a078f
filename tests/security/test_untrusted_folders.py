"""Nothing in a folder runs: no pickle, no code of a model or tokenizer, no tag of YAML, no template, no task file."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from moestro.cli import main
from moestro.export import open_model
from moestro.formats import FormatError
from moestro.hf import load
from moestro.recipe.load import load_recipe
from moestro.recipe.syntax import RecipeError, parse_yaml
from moestro.serve.chat import render
from tests.stock_models import byte_tokenizer, stock_folder, tiny_llama

UPCYCLED = "method={kind: upcycle, n_experts: 2, top_k: 1}"


class Trap:
    """A pickle that makes a file when it is read."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self) -> Any:
        return (Path.touch, (self.sprung,))


@pytest.fixture
def sprung(tmp_path: Path) -> Path:
    """The file that is there once a trap has run."""
    return tmp_path / "sprung"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A stock model's folder."""
    return stock_folder(tmp_path / "model")


def verbs(folder: Path, out: Path) -> list[list[str]]:
    """Every verb that opens a folder of the Hugging Face format."""
    return [
        ["generate", str(folder), "--prompt", "a", "--max-new-tokens", "1"],
        ["import", str(folder), "--out", str(out / "run")],
        ["compress", str(folder), str(out / "small"), "--method", "width", "--ratio", "0.5"],
        ["offload", str(folder), "--memory", "1MiB", "--prompt", "a"],
        ["convert", str(folder), "--out", str(out / "stock"), "--stock", UPCYCLED],
    ]


def test_the_trap_works(sprung: Path) -> None:
    pickle.loads(pickle.dumps(Trap(sprung)))
    assert sprung.exists()


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pth"])
def test_pickles_are_not_read(folder: Path, sprung: Path, tmp_path: Path, name: str, number: int) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Trap(sprung)))
    assert main(verbs(folder, tmp_path)[number]) != 0 and not sprung.exists()


def test_pickles_are_not_read_by_the_library_either(folder: Path, sprung: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(tiny_llama().state_dict(), folder / "pytorch_model.bin")
    for read in (open_model, load):
        with pytest.raises(FormatError, match=r"pytorch_model\.bin is a pickle, which is never loaded"):
            read(folder)


@pytest.mark.parametrize("number", range(5))
def test_code_of_a_model_does_not_run(folder: Path, sprung: Path, tmp_path: Path, number: int) -> None:
    (folder / "evil.py").write_text(f"open({str(sprung)!r}, 'w').close()\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    assert main(verbs(folder, tmp_path)[number]) != 0 and not sprung.exists()


def test_code_of_a_tokenizer_does_not_run(folder: Path, sprung: Path, tmp_path: Path) -> None:
    (folder / "evil.py").write_text(f"open({str(sprung)!r}, 'w').close()\n")
    (folder / "tokenizer.json").unlink()
    settings = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    for words in verbs(folder, tmp_path)[:2]:
        assert main(words) != 0 and not sprung.exists()


def test_code_runs_only_where_it_is_trusted(folder: Path, sprung: Path) -> None:
    (folder / "evil.py").write_text(f"open({str(sprung)!r}, 'w').close()\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError):
        open_model(folder)
    assert not sprung.exists()
    with pytest.raises((AttributeError, ValueError, OSError)):
        open_model(folder, trust_remote_code=True)
    assert sprung.exists()


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.mkdir [{}]", "!!python/object/new:os.mkdir [[{}]]", "!!python/name:os.mkdir x"]
)
def test_tags_of_yaml_make_no_objects(tag: str, sprung: Path, tmp_path: Path) -> None:
    text = tag.format(sprung)
    (tmp_path / "recipe.yaml").write_text(f"model: {text}\n")
    with pytest.raises(RecipeError, match="tags such as"):
        load_recipe(tmp_path / "recipe.yaml")
    with pytest.raises(RecipeError, match="tags such as"):
        parse_yaml(text, "--option")
    for words in (["compare", str(tmp_path / "recipe.yaml")], ["train", str(tmp_path / "recipe.yaml"), f"a={text}"]):
        assert main(words) == 2 and not sprung.exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ cycler.__init__.__globals__.os.mkdir('SPRUNG') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10**12) %}x{% endfor %}",
        "{{ raise_exception('no') }}",
        "{% set x = namespace(y=1) %}{{ x['__class__'] }}{{ x.__class__.__init__.__globals__ }}",
    ],
)
def test_chat_templates_reach_nothing(template: str, sprung: Path, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(tmp_path / "tokenizer")
    tokenizer.chat_template = template.replace("SPRUNG", str(sprung))
    with pytest.raises(ValueError, match="the model's chat template refuses these messages"):
        render(tokenizer, [{"role": "user", "content": "hello"}])
    assert not sprung.exists()


TASK = "task: own\ndataset_path: json\noutput_type: multiple_choice\ndoc_to_text: x\n"


@pytest.mark.parametrize(
    "content",
    [
        "process_docs: !function evil.run\n",
        "include: other.yaml\n",
        "metadata: {a: [{b: !function evil.run}]}\n",
        "class: evil.Task\n",
        "unsafe_code: true\n",
        "x: !!python/name:evil.run\n",
        "custom_dataset: !function moestro.harness.reading.evil\n",
    ],
)
def test_task_files_name_no_code(content: str, sprung: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from moestro.harness import resolve_tasks

    code = f"open({str(sprung)!r}, 'w').close()\ndef run(x): return x\nevil = run\n"
    (tmp_path / "evil.py").write_text(code)
    if "moestro" in content:
        # beside the file lies what would be taken for this package
        (tmp_path / "moestro" / "harness").mkdir(parents=True)
        (tmp_path / "moestro" / "harness" / "reading.py").write_text(code)
    (tmp_path / "other.yaml").write_text("process_docs: !function evil.run\n")
    task = tmp_path / "own.yaml"
    task.write_text(TASK + content)
    words = ["eval", str(tmp_path), "--tasks", str(task), "--data", str(tmp_path)]
    assert main(words) == 2 and "would run code; --trust-task-code allows it" in capsys.readouterr().err
    assert not sprung.exists()
    assert resolve_tasks([str(task)], trust_code=True) == [str(task)]


def test_templates_of_tasks_reach_nothing() -> None:
    from jinja2.exceptions import SecurityError
    from lm_eval import utils

    from moestro.harness.trust import sandbox_templates

    sandbox_templates()
    assert utils.apply_template("{{ a }}: {{ b | regex_replace('x', 'y') }}\n", {"a": 1, "b": "xx"}) == "1: yy\n"
    with pytest.raises(SecurityError):
        utils.apply_template("{{ cycler.__init__.__globals__.os.getcwd() }}", {})

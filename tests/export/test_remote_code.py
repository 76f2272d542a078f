"""Folders of every system in a process that does not have this package: the same logits, the same text."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moestro.export import MoestroForCausalLM
from moestro.export.remote_code import remote_code
from moestro.ops import backend
from tests.conftest import ROOT
from tests.export.conftest import SYSTEMS, hosted, some_tokens

# Isolated, and whatever the environment has installed: the package cannot be imported.
ALONE = """
import json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("moestro", "jaxtyping", "triton"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
from pathlib import Path
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

torch.set_num_threads(1)

def in_own_memory(model):  # as tests.hf.families has it, and why
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()
    return model

found = {}
for folder in map(Path, sys.argv[1:]):
    expected = load_file(folder / "expected.st")
    model = in_own_memory(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True))
    loss = model(expected["tokens"], labels=expected["tokens"]).loss
    loss.backward()
    trained = all(p.grad is not None for n, p in model.named_parameters() if "attention" in n)
    with torch.no_grad():
        logits = model(expected["tokens"]).logits
        said = model.generate(expected["tokens"], max_new_tokens=4, do_sample=False, pad_token_id=256)
        base = in_own_memory(AutoModel.from_pretrained(folder, trust_remote_code=True))
        hidden = model.lm_head(base(expected["tokens"]).last_hidden_state)
        model.save_pretrained(folder / "again")
        again = in_own_memory(AutoModelForCausalLM.from_pretrained(folder / "again", trust_remote_code=True))
        kept = torch.equal(again(expected["tokens"]).logits, logits)
    found[folder.name] = [
        torch.equal(logits, expected["logits"]), torch.equal(said, expected["said"]),
        torch.equal(hidden, logits), kept, trained,
    ]
print(json.dumps(found))
"""


def written(name: str, folder: Path) -> Path:
    """A system's model with its code, and what it computes by the definition of every operation."""
    model: MoestroForCausalLM = hosted(name)
    model.generation_config.use_cache = model.decoder.causal
    model.save_pretrained(folder / name)
    tokens = some_tokens(2, 12)
    with torch.no_grad(), backend.force("reference"):
        said = model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=256)
        save_file({"tokens": tokens, "logits": model(tokens).logits, "said": said}, folder / name / "expected.st")
    return folder / name


def check(names: list[str], folder: Path) -> None:
    folders = [str(written(name, folder)) for name in names]
    settings = {**os.environ, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", ALONE, *folders]
    done = subprocess.run(command, capture_output=True, text=True, env=settings, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {name: [True] * 5 for name in names}


def test_hmoe_and_peer_load_where_the_package_is_not(tmp_path: Path) -> None:
    check(["hmoe", "peer"], tmp_path)


@pytest.mark.slow
def test_every_system_loads_where_the_package_is_not(tmp_path: Path) -> None:
    check(SYSTEMS, tmp_path)


@pytest.mark.parametrize("name", ["stratified", "mumoe_ring", "mpoe"])
def test_other_systems_have_files_that_stand_alone(name: str) -> None:
    """Bundling itself refuses what reads a name that it does not define."""
    code = remote_code(hosted(name).config.construction)["modeling_moestro.py"]
    assert "moestro.ops.native" not in code and compile(code, name, "exec")


def test_unregistered_a_folder_asks_whether_its_code_may_run(tmp_path: Path) -> None:
    """Without what an installed package does when Python starts, and before its import."""
    hosted("dense").save_pretrained(tmp_path / "out")
    program = (
        "import sys, transformers\n"
        "try:\n    transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "except ValueError as error:\n    print(error)\n"
        "assert 'moestro' not in sys.modules\n"
        "import moestro.export\n"
        "print(type(transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])).__module__)\n"
    )
    settings = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    settings["MOESTRO_START_UP"] = "off"
    command = [sys.executable, "-c", program, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=settings, stdin=subprocess.DEVNULL, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "contains custom code which must be executed to correctly load the model" in done.stdout
    assert done.stdout.splitlines()[-1] == "moestro.export.modeling"

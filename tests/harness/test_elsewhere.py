"""Every kind of system in a process that does not have this package: lm-eval scores it as our own evaluation does, and
it continues a text with the same tokens."""

import json
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from moestro.cli import main
from moestro.export import open_model
from moestro.harness import ScoredModel, evaluate_tasks
from moestro.ops import backend
from tests.conftest import ROOT
from tests.harness.test_systems import CLOSE, RECIPES, TEXT, dtype_of, own_bits_per_byte, trained

ROWS = [{"context": "the quick brown", "choices": ["fox", "a dog", "jumps over"], "gold": n % 3} for n in range(3)]
ROWS += [{"context": "jumps over", "choices": ["lazy dogs;", "x"], "gold": 0}, {**ROWS[0], "context": "over"}]
LOOKING_AHEAD = ("expert_choice", "mixture_of_depths")
CONVERTED = {"factorllm": "factorllm", "uneven": "uneven", "upcycled": "upcycle"}
# one of each row of docs/systems.md that is a model
SYSTEMS = [*RECIPES, "moe", "pkm", "peer_uneven", "mutual_distillation", "hmoe_peer", *CONVERTED, *LOOKING_AHEAD]
PROMPT, NEW = "the quick", 5
# Isolated, with tasks that ask nothing of this package.
ALONE = """
import json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("moestro", "jaxtyping"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
from pathlib import Path
import torch
from lm_eval.evaluator import simple_evaluate
from transformers import AutoModelForCausalLM, AutoTokenizer

read = {"dataset_path": "json", "validation_split": "validation", "num_fewshot": 0}
def files(name):
    return {"dataset_kwargs": {"data_files": {"validation": f"{data}/{name}.jsonl"}}}
def metrics(*names):
    return {"metric_list": [{"metric": n, "aggregation": a, "higher_is_better": True} for n, a in names]}
def tasks():
    choices = {"task": "choices", "output_type": "multiple_choice", "doc_to_text": "context",
        "doc_to_choice": "choices", "doc_to_target": "gold", **read, **files("choices"),
        **metrics(("acc", "mean"), ("acc_norm", "mean"))}
    text = {"task": "text", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "page",
        **read, **files("text"), **metrics(("bits_per_byte", "bits_per_byte"))}
    return [choices, text]

data, answer, prompt, new, *folders = sys.argv[1:]
torch.set_num_threads(1)
found = {}
for folder, dtype in zip(map(Path, folders[::2]), folders[1::2], strict=True):
    use_cache = json.loads((folder / "generation_config.json").read_text()).get("use_cache", True)
    # tokens that depend on others are scored alone
    results = simple_evaluate("hf", tasks=tasks(), batch_size=4 if use_cache else 1, device="cpu", bootstrap_iters=0,
        model_args={"pretrained": str(folder), "trust_remote_code": True, "dtype": dtype})["results"]
    chosen, said = results["choices"], results["text"]
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype)
    ids = AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt")
    text = model.generate(**ids, max_new_tokens=int(new), min_new_tokens=int(new), do_sample=False)
    found[folder.name] = [chosen["acc,none"], chosen["acc_norm,none"], said["bits_per_byte,none"], text.tolist()]
Path(answer).write_text(json.dumps(found))
"""


def run_of(name: str, folder: Path, small_data: list[str]) -> Path:
    """A trained run of a recipe, or one that a trained dense run was converted into."""
    if name not in CONVERTED:
        return trained(name, folder / "runs" / name, small_data)
    dense, out = folder / "runs" / "dense", folder / "runs" / name
    if not dense.exists():
        trained("dense", dense, small_data)
    recipe = ROOT / "recipes" / "convert" / f"{CONVERTED[name]}.yaml"
    said = ["--recipe", str(recipe), "tokens=64", "run.train.budget={steps: 2}", "run.train.eval_tokens=64"]
    taught = ["router.steps=2"] if name == "factorllm" else []
    assert main(["convert", str(dense), "--out", str(out), *said, *taught]) == 0
    return out


def written(folder: Path) -> None:
    """The same rows for our task and for theirs, and a text of one page."""
    rows = "".join(json.dumps(row) + "\n" for row in ROWS)
    for name in ("eval", "lm/wikitext-2"):
        (folder / name).mkdir(parents=True)
    for file in ("eval/piqa.jsonl", "choices.jsonl"):
        (folder / file).write_text(rows)
    (folder / "text.jsonl").write_text(json.dumps({"page": TEXT}) + "\n")
    (folder / "lm" / "wikitext-2" / "valid.txt").write_text(TEXT)


@pytest.fixture(scope="module")
def alone(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, small_data: list[str]
) -> tuple[Path, dict[str, Any]]:
    """The folder of runs and exports, and what one other process said of the exports that tests ask for."""
    folder = tmp_path_factory.mktemp("elsewhere")
    written(folder)
    asked = {item.callspec.params["name"] for item in request.session.items if item.module is request.module}  # type: ignore[attr-defined]
    names = [name for name in SYSTEMS if name in asked]
    for name in names:
        run = run_of(name, folder, small_data)
        assert main(["export", str(run), "--out", str(folder / "exported" / name), "--unfinished"]) == 0
    settings = {**os.environ, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    exported, answer = [(str(folder / "exported" / name), dtype_of(name)) for name in names], folder / "answer.json"
    command = [sys.executable, "-I", "-c", ALONE, str(folder), str(answer), PROMPT, str(NEW), *chain(*exported)]
    done = subprocess.run(command, capture_output=True, text=True, env=settings, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, json.loads(answer.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", SYSTEMS)
def test_lm_eval_alone_scores_and_generates_what_we_do(name: str, alone: tuple[Path, dict[str, Any]]) -> None:
    folder, said = alone
    accuracy, normalised, bits, text = said[name]
    opened: Any = open_model(folder / "runs" / name, dtype=getattr(torch, dtype_of(name)))
    with backend.force("reference"):
        tasks = evaluate_tasks(ScoredModel(*opened, batch_size=4), ["piqa", "wikitext"], folder)["tasks"]
        ids = opened.tokenizer(PROMPT, return_tensors="pt")
        own = opened.model.generate(**ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    chosen, page = tasks["piqa"]["metrics"], tasks["wikitext"]["metrics"]
    assert (accuracy, normalised) == (chosen["acc"]["value"], chosen["acc_norm"]["value"])
    assert text == own.tolist() and torch.is_tensor(own)
    assert bits == pytest.approx(page["bits_per_byte"]["value"], rel=CLOSE[dtype_of(name)])
    if name not in LOOKING_AHEAD:
        own_bits = own_bits_per_byte(folder / "runs" / name, dtype_of(name))
        assert bits == pytest.approx(own_bits, rel=CLOSE[dtype_of(name)])

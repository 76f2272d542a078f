"""Exported folders in a process that does not have this package: lm-eval scores them as our own evaluation does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moestro.cli import main
from moestro.export import open_model
from moestro.harness import ScoredModel, evaluate_tasks
from tests.harness.test_systems import TEXT, own_bits_per_byte, trained

ROWS = [{"context": "the quick brown", "choices": ["fox", "a dog", "jumps over"], "gold": n % 3} for n in range(3)]
ROWS += [{"context": "jumps over", "choices": ["lazy dogs;", "x"], "gold": 0}, {**ROWS[0], "context": "over"}]
# Isolated, with tasks that ask nothing of this package.
ALONE = """
import json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("moestro", "jaxtyping"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
from lm_eval.evaluator import simple_evaluate

folder, data = sys.argv[1:]
read = {"dataset_path": "json", "validation_split": "validation", "num_fewshot": 0}
def files(name):
    return {"dataset_kwargs": {"data_files": {"validation": f"{data}/{name}.jsonl"}}}
def metrics(*names):
    return {"metric_list": [{"metric": n, "aggregation": a, "higher_is_better": True} for n, a in names]}
choices = {"task": "choices", "output_type": "multiple_choice", "doc_to_text": "context", "doc_to_choice": "choices",
    "doc_to_target": "gold", **read, **files("choices"), **metrics(("acc", "mean"), ("acc_norm", "mean"))}
text = {"task": "text", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "page",
    **read, **files("text"), **metrics(("bits_per_byte", "bits_per_byte"))}
found = simple_evaluate("hf", tasks=[choices, text], batch_size=4, device="cpu", bootstrap_iters=0,
    model_args={"pretrained": folder, "trust_remote_code": True, "dtype": "float32"})["results"]
chosen, said = found["choices"], found["text"]
print(json.dumps([chosen["acc,none"], chosen["acc_norm,none"], said["bits_per_byte,none"]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["hmoe", "peer", "mpoe", "smola"])
def test_lm_eval_alone_scores_what_we_do(recipe: str, tmp_path: Path, small_data: list[str]) -> None:
    run, out = trained(recipe, tmp_path / "run", small_data), tmp_path / "exported"
    assert main(["export", str(run), "--out", str(out)]) == 0
    written(tmp_path)
    own = evaluate_tasks(ScoredModel(*open_model(run), batch_size=4), ["piqa"], tmp_path)["tasks"]["piqa"]["metrics"]
    settings = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", ALONE, str(out), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=settings, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    accuracy, normalised, bits = json.loads(done.stdout.splitlines()[-1])
    assert (accuracy, normalised) == (own["acc"]["value"], own["acc_norm"]["value"])
    assert bits == pytest.approx(own_bits_per_byte(run), rel=1e-5)


def written(folder: Path) -> None:
    """The same rows for our task and for theirs, and a text of one page."""
    rows = "".join(json.dumps(row) + "\n" for row in ROWS)
    (folder / "eval").mkdir()
    for file in ("eval/piqa.jsonl", "choices.jsonl"):
        (folder / file).write_text(rows)
    (folder / "text.jsonl").write_text(json.dumps({"page": TEXT}) + "\n")

"""torch.compile as an option, in a process without the shape checker (pytorch issue 122093)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tolerances import FLOAT32

ROOT = Path(__file__).resolve().parents[2]
RUN = """
import json, sys
from pathlib import Path
import torch
from moestro.train import train
from tests.train.tiny import Counting, tiny_model, tiny_settings
for name, change in (("eager", {}), ("compiled", {"compile": True}), ("both", {"compile": True, "recompute": True})):
    result = train(tiny_model(), Counting(), tiny_settings(6, **change), [], [], Path(sys.argv[1]) / name)
    print(json.dumps(result))
print(torch._dynamo.utils.counters["stats"]["unique_graphs"])
"""


@pytest.mark.slow
def test_compiled_training_equals_eager_training(tmp_path):
    command = [sys.executable, "-c", RUN, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    eager, *compiled, graphs = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(compiled) == 2
    assert graphs > 0
    for result in compiled:
        assert result["eval"]["loss"] == pytest.approx(eager["eval"]["loss"], rel=FLOAT32["rtol"])
        assert result["flops"] == eager["flops"]

"""`moestro train recipes/hmoe.yaml` on WikiText-2, killed at random steps, ends as if it had not been."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STEPS, KILLS = 60, 6
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(data: Path, out: Path) -> list[str]:
    texts = {
        name: f"{{kind: text, split: heading, paths: {data}/lm/wikitext-2/{name}.txt}}" for name in ("train", "valid")
    }
    settings = [
        f"data.source={texts['train']}",
        f"data.val_source={texts['valid']}",
        f"train.budget.steps={STEPS}",
        "train.batch_size=4",
        "train.eval_every=20",
        "train.eval_tokens=4096",
        "train.save_every=7",
        "train.tensorboard=false",
    ]
    return [sys.executable, "-m", "moestro", "train", "recipes/hmoe.yaml", *settings, "--out", str(out)]


def run(data: Path, out: Path) -> None:
    done = subprocess.run(command(data, out), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def lines(out: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in entry.items() if key != "time"} for entry in entries]


def steps_written(out: Path) -> int:
    file = out / "metrics.jsonl"
    return file.read_text().count('"loss"') if file.exists() else 0


@pytest.mark.slow
def test_killed_at_random_steps_it_ends_with_the_same_metrics(shared_data, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(shared_data, whole)
    rng = random.Random(0)
    for target in sorted(rng.sample(range(2, STEPS - 2), KILLS)):
        process = subprocess.Popen(command(shared_data, broken), cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 300
        while steps_written(broken) < target and process.poll() is None:
            assert time.monotonic() < deadline, f"step {target} was not reached"
            time.sleep(0.01)
        assert process.poll() is None, "the run ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
    run(shared_data, broken)
    assert lines(broken) == lines(whole)
    results = [json.loads((out / "done.json").read_text()) for out in (whole, broken)]
    for result in results:
        result.pop("time")
    assert results[0] == results[1]
    sessions = json.loads((broken / "environment.json").read_text())
    assert len(sessions) == KILLS + 1

"""Recipes of runs that are started as users start them, and what becomes of their processes."""

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.conftest import ROOT, WORDS

RECIPE = """
model:
  d_model: 16
  n_layers: 2
  attention: {{n_heads: 2}}
  ffn:
    kind: moe
    router: {{kind: scored, score: {{kind: linear}}, select: {{kind: top_k, top_k: 2}}}}
    branches: [{{kind: ffn, widths: [8, 16, 24]}}]
data: {{source: {{kind: text, paths: {text}}}, tokenizer: {{kind: bytes}}, seq_len: 16, val_fraction: 0.2}}
train: {{budget: {{steps: {steps}}}, batch_size: 4, eval_every: 0, save_every: 10, eval_tokens: 200}}
parallel: {{timeout_s: {timeout}}}
"""


def write_recipe(folder: Path, steps: int, timeout: float = 60) -> Path:
    """A tiny mixture of experts on some paragraphs, which saves every 10 steps."""
    draw, text = random.Random(0), folder / "text"
    text.mkdir()
    for number in range(60):
        (text / f"{number}.txt").write_text(" ".join(draw.choices(WORDS, k=60)))
    file = folder / "tiny.yaml"
    file.write_text(RECIPE.format(text=text, steps=steps, timeout=timeout))
    return file


def command(recipe: Path, run: Path, *options: str) -> list[str]:
    """`moestro train`, on the CPU."""
    return [sys.executable, "-m", "moestro", "train", str(recipe), "--out", str(run), "--device", "cpu", *options]


def environment(**more: str) -> dict[str, str]:
    """One thread a rank, whatever started the tests."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def start(words: Sequence[str], log: Path, **more: str) -> subprocess.Popen:
    """A process whose output goes to `log`."""
    with log.open("w") as output:
        return subprocess.Popen(words, stdout=output, stderr=output, env=environment(**more), cwd=ROOT)


def until(there: Callable[[], object], seconds: float, what: str) -> None:
    """Wait for something to be so."""
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.1)


def saved(run: Path) -> list[str]:
    """Checkpoints that are complete."""
    return sorted(path.name for path in (run / "checkpoints").glob("step-*"))


def ranks_of(run: Path) -> dict[int, int]:
    """{rank: process} of the processes that train in a run folder."""
    found: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode().split("\0")
            variables = dict(
                entry.split("=", 1) for entry in (folder / "environ").read_bytes().decode().split("\0") if "=" in entry
            )
        except (OSError, UnicodeDecodeError, ValueError):
            continue
        if str(run) in words and "RANK" in variables:
            found[int(variables["RANK"])] = int(folder.name)
    return found

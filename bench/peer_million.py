"""A million experts trained on WikiText-2: once through, and once more killed on the way and continued.

`recipes/peer_million.yaml` (1024^2 experts of width 256) is trained by the command line in processes of its own. The
second run gets SIGKILL a twentieth of the steps after its first checkpoint and is then started again. Rows: the largest
resident memory of any process beside the limit, the time of a step, and how many tensors of the last checkpoint
(weights, optimizer state) are equal to those of the first run, to the bit. Fails where one is not, or memory was
exceeded. Both runs need some 20 GB of disk, which is freed at the end.

    python -m bench.peer_million [--steps 200] [--text FOLDER] [--json PATH] [key=value ...]
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median, quantiles

import torch

from bench.harness import ROOT, Row, report
from moestro.train.checkpoint import list_checkpoints, read_tensors

RECIPE = "recipes/peer_million.yaml"
TEXT = ROOT.parent / "shared" / "data" / "lm" / "wikitext-2"
LIMIT_GIB = 24.0


def options() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="at least 4")
    parser.add_argument("--text", type=Path, default=TEXT, metavar="FOLDER", help="holds train.txt and valid.txt")
    parser.add_argument("--folder", type=Path, default=Path("runs/peer_million"), help="for both runs; removed")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the rows as JSON")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="other settings of the recipe")
    parsed = parser.parse_args()
    if parsed.steps < 4:
        parser.error(f"--steps {parsed.steps}: at least 4")
    return parsed


def command(asked: argparse.Namespace, out: Path, save_every: int) -> list[str]:
    """Train, or go on training, in `out`; every run is saved at its end."""
    texts = {
        f"data.{key}": f"{{kind: text, split: heading, paths: {asked.text.resolve() / name}.txt}}"
        for key, name in (("source", "train"), ("val_source", "valid"))
    }
    settings = {
        **texts,
        "train.budget": f"{{steps: {asked.steps}}}",
        "train.save_every": save_every,
        "train.eval_every": 0,
        "train.eval_tokens": 16_384,
        "train.seed": asked.seed,
        "train.tensorboard": "false",
    }
    words = [f"{key}={value}" for key, value in settings.items()]
    return [sys.executable, "-m", "moestro", "train", RECIPE, *words, *asked.overrides, "--out", str(out)]


def trained(asked: argparse.Namespace, out: Path, save_every: int = 0, kill_at: int | None = None) -> float:
    """Run the command to its end, or until step `kill_at` is done; returns the largest resident memory in GiB."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(asked.threads), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command(asked, out, save_every), cwd=ROOT, env=environment)
    if kill_at is not None:
        while len(step_lines(out)) < kill_at:
            time.sleep(0.02)
            if process.poll() is not None:
                sys.exit(f"training in {out} ended before step {kill_at}")
        process.send_signal(signal.SIGKILL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != (0 if kill_at is None else -signal.SIGKILL):
        sys.exit(f"training in {out} ended with {process.returncode}")
    return used.ru_maxrss / 2**20


def step_lines(out: Path) -> list[dict]:
    """What a run wrote about its steps."""
    file = out / "metrics.jsonl"
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [line for line in lines if "loss" in line]


def equal_tensors(one: Path, other: Path) -> tuple[int, int]:
    """How many tensors of the runs' last checkpoints are equal to the bit, and how many there are."""
    paths = [list_checkpoints(run / "checkpoints")[-1] for run in (one, other)]
    same = total = 0
    for name in ("model", "optimizer"):
        first, second = (read_tensors(path, name) for path in paths)
        if paths[0].name != paths[1].name or first.keys() != second.keys():
            sys.exit(f"{paths[0]} and {paths[1]} do not hold the same tensors")
        total += len(first)
        same += sum(torch.equal(tensor, second[key]) for key, tensor in first.items())
    return same, total


def seconds(run: Path, saved: int) -> list[float]:
    """Of each step but the first and the one after the checkpoint, which is the first of the second session: a
    session's first step also makes the pages of the tables."""
    return [line["time"]["step_seconds"] for line in step_lines(run) if line["step"] not in (1, saved + 1)]


def rows(asked: argparse.Namespace, peak: float, whole: Path, killed: Path) -> list[Row]:
    """What was measured."""
    case = ", ".join([f"PEER N=1024^2 d=256, WikiText-2, {asked.steps} steps", *asked.overrides])
    mine, theirs = (seconds(run, asked.steps // 2) for run in (whole, killed))
    tenths = quantiles([b / a for a, b in zip(mine, theirs, strict=True)], n=10, method="inclusive")
    step = median(mine), median(theirs)
    same, total = equal_tensors(whole, killed)
    fit, equal = LIMIT_GIB / peak, same / total
    return [
        Row(case, "peak resident memory", "GiB", peak, "limit", LIMIT_GIB, fit, (fit, fit)),
        Row(case, "a step", "s", step[0], "killed, continued", step[1], step[1] / step[0], (tenths[0], tenths[-1])),
        Row(case, "equal to the bit", "tensors", same, "killed, continued", total, equal, (equal, equal)),
    ]


def main() -> None:
    asked = options()
    shutil.rmtree(asked.folder, ignore_errors=True)
    whole, killed = asked.folder / "whole", asked.folder / "killed"
    kill_at = asked.steps // 2 + max(1, asked.steps // 20)
    memory = [trained(asked, whole), trained(asked, killed, asked.steps // 2, kill_at)]
    if not list_checkpoints(killed / "checkpoints"):
        sys.exit("the second run was killed before its first checkpoint")
    memory.append(trained(asked, killed))
    found = rows(asked, max(memory), whole, killed)
    report("bench/peer_million.py", found, asked)
    shutil.rmtree(asked.folder)
    if not all(row.ratio >= 1 for row in found if row.unit != "s"):
        sys.exit("the continued run differs, or memory was exceeded: see the rows")


if __name__ == "__main__":
    main()

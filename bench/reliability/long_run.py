"""Hours of training, and a machine that is lost on the way.

`recipes/hmoe_peer.yaml` (unequal experts and PEER in one decoder) is trained by the command line on all cores, with
evaluations and checkpoints, until the time is up; half way it gets SIGKILL, as if its machine were gone, and the same
command is run again. Told are steps, losses, memory (every minute) and what the loss of the machine cost; wanted is
that there are steps to repeat, which have the losses they had, to the bit, that the last evaluation is the best or near
it and better than the first, and that memory does not grow.

    python -m bench.reliability.long_run --text FILE ... [--hours 2] [--json PATH] [key=value ...]
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
from statistics import median

from bench.harness import ROOT
from bench.reliability.figures import Figure, report
from bench.reliability.leaks import resident
from moestro.train.checkpoint import list_checkpoints, read_state

RECIPE = "recipes/hmoe_peer.yaml"
MINUTE = 60.0
VOCABULARY = 4096
SAVE_EVERY = 500
# what resident memory may grow by from a session's tenth minute to its end
GROWTH = 0.05


def options() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="JSON lines or text to train on")
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--folder", type=Path, default=Path("runs/long"), help="the run's; must not exist")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures as JSON")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="other settings of the recipe")
    parsed = parser.parse_args()
    if parsed.folder.exists():
        parser.error(f"--folder {parsed.folder} exists")
    return parsed


def command(asked: argparse.Namespace) -> list[str]:
    """Train, or go on training."""
    paths = ", ".join(str(path.resolve()) for path in asked.text)
    settings = {
        "data.source": f"{{kind: jsonl, paths: [{paths}]}}",
        "data.tokenizer.vocab_size": VOCABULARY,
        "data.val_fraction": 0.01,
        "optim.lr": 1e-3,
        "optim.schedule": "{kind: constant, warmup: 200}",
        # more than any machine does in the time: the clock ends the run
        "train.budget": "{steps: 100_000_000}",
        "train.eval_every": SAVE_EVERY,
        "train.save_every": SAVE_EVERY,
        "train.seed": asked.seed,
        "train.tensorboard": "false",
    }
    words = [f"{key}={value}" for key, value in settings.items()]
    return [sys.executable, "-m", "moestro", "train", RECIPE, *words, *asked.set, "--out", str(asked.folder)]


class Session:
    """One process that trains; `memory` is its resident memory in MiB, minute by minute."""

    def __init__(self, asked: argparse.Namespace) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(asked.threads), "HF_HUB_OFFLINE": "1"}
        with (asked.folder.parent / f"{asked.folder.name}.log").open("a") as log:
            self.process = subprocess.Popen(command(asked), cwd=ROOT, env=environment, stderr=log, stdout=log)
        self.memory: list[float] = []

    def watch(self, seconds: float) -> None:
        """Let it train for so long; exits with an error where it ends by itself."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(min(MINUTE, max(0.0, until - time.monotonic())))
            if self.process.poll() is not None:
                sys.exit(f"training ended by itself with {self.process.returncode}")
            self.memory.append(resident(self.process.pid) / 1024)

    def end(self, by: signal.Signals) -> int:
        """Send the signal and wait; returns the exit status."""
        self.process.send_signal(by)
        return self.process.wait()

    @property
    def growth(self) -> float:
        """Resident memory at the end over that after ten minutes, or a tenth of a shorter session; 1 for no growth."""
        start = min(10, len(self.memory) // 10)
        return median(self.memory[-5:]) / median(self.memory[start : start + 5])


def lines(run: Path) -> list[dict]:
    """The complete lines of the run's metrics."""
    text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def main() -> None:
    asked = options()
    asked.folder.parent.mkdir(parents=True, exist_ok=True)
    half = asked.hours * 3600 / 2
    first = Session(asked)
    first.watch(half)
    first.end(signal.SIGKILL)
    lost = lines(asked.folder)
    kept = len(list_checkpoints(asked.folder / "checkpoints"))
    if not kept:
        sys.exit("killed before the first checkpoint: give it more --hours")
    second = Session(asked)
    second.watch(half)
    status = second.end(signal.SIGTERM)
    found = figures(asked, [first, second], lost, status)
    shutil.copy(asked.folder / "metrics.jsonl", asked.folder.parent / f"{asked.folder.name}.jsonl")
    report("bench/reliability/long_run.py", found, asked)


def figures(asked: argparse.Namespace, sessions: list[Session], lost: list[dict], status: int) -> list[Figure]:
    """What was seen, and what it has to be."""
    case = f"HMoE and PEER, {asked.hours:g} hours, one loss of the machine"
    written = lines(asked.folder)
    losses = [line["eval"]["loss"] for line in written if "eval" in line]
    steps = [line for line in written if "loss" in line]
    last = steps[-1]["step"]
    saved = read_state(list_checkpoints(asked.folder / "checkpoints")[-1])["step"]
    learned = losses[-1] <= 1.01 * min(losses) and losses[-1] < losses[0]
    growth = max(session.growth for session in sessions)
    return [
        Figure(case, "optimizer steps", last, "", "each once", [s["step"] for s in steps] == list(range(1, last + 1))),
        Figure(case, "tokens", steps[-1]["tokens"]),
        Figure(case, "time in training steps", steps[-1]["time"]["seconds"] / 3600, "h"),
        Figure(case, "evaluations", len(losses)),
        Figure(case, "first held-out loss", losses[0], "nats"),
        Figure(case, "last held-out loss", losses[-1], "nats", "within 1 % of the best, below the first", learned),
        *recovery(case, asked.folder, lost, {line["step"]: line for line in steps}),
        Figure(case, "exit status after SIGTERM", status, "", "0", status == 0),
        Figure(case, "step of the last checkpoint, hashes verified", saved, "", "the last", saved == last),
        Figure(case, "largest resident memory", max(max(session.memory) for session in sessions), "MiB"),
        Figure(case, "resident memory, end over start", growth, "", f"at most {1 + GROWTH}", growth <= 1 + GROWTH),
    ]


def recovery(case: str, run: Path, lost: list[dict], now: dict[int, dict]) -> list[Figure]:
    """What the loss of the machine cost, and whether training went on as it would have."""
    resumed_from = json.loads((run / "environment.json").read_text(encoding="utf-8"))[-1]["from_step"]
    repeated = [line for line in lost if "loss" in line and line["step"] > resumed_from]
    same = sum(bare(line) == bare(now[line["step"]]) for line in repeated)
    few = len(repeated) <= SAVE_EVERY
    return [
        Figure(case, "steps lost with the machine and repeated", len(repeated), "", f"at most {SAVE_EVERY}", few),
        Figure(case, "of these equal to the bit (loss, norms, FLOPs)", same, "", "all", same == len(repeated) > 0),
    ]


def bare(line: dict) -> dict:
    """A line without what the clock adds."""
    return {key: value for key, value in line.items() if key != "time"}


if __name__ == "__main__":
    main()

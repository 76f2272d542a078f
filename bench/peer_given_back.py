"""PEER beside the public package in a process that gives freed memory back to the system, as most programs do.

`bench.harness` keeps freed memory on all sides, as our training does. The package's gathered rows, and its gradients of
whole tables, are then no new pages in every call, which they are for its users. `bench.peer` runs this file for each
size and reads the rows that it prints; both sides are timed here, in one race.

    python -m bench.peer_given_back '{"shape": {"tokens": 512, "d": 512, "side": 512}, "rounds": 7, "seed": 0}'
"""

import json
import subprocess
import sys
from dataclasses import asdict

import torch

from bench.harness import ROOT, Row, agree
from bench.peer import OURS, PACKAGE, Shape, agreeing_steps, duel, pair, under

GIVEN_BACK = ", freed memory given back"


def measured(shape: Shape, rounds: int) -> list[Row]:
    """Forward and training step at one size."""
    ours, theirs = pair(shape, sparse_gradients=True)
    x = torch.randn(shape.tokens, shape.d)
    run_ours, run_theirs = (lambda: ours(x)[0]), (lambda: theirs(x[None])[0])
    with torch.no_grad():
        for name in OURS:
            agree(f"{shape.case}, {name}, output", under(name, run_ours)(), run_theirs(), 1e-4)
        rows = duel(shape.case, f"forward{GIVEN_BACK}", run_ours, PACKAGE, run_theirs, rounds)
    steps = agreeing_steps(shape, ours, theirs, x)
    return rows + duel(shape.case, f"training step{GIVEN_BACK}", steps[0], f"{PACKAGE} + AdamW", steps[1], rounds)


def in_its_own_process(shape: Shape, rounds: int, seed: int) -> list[Row]:
    """The same, by another process. Exits with its error where it fails."""
    asked = json.dumps({"shape": asdict(shape), "rounds": rounds, "seed": seed, "threads": torch.get_num_threads()})
    command = [sys.executable, "-m", "bench.peer_given_back", asked]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}: {done.stderr.strip()}")
    return [Row(**{**row, "spread": tuple(row["spread"])}) for row in json.loads(done.stdout)]


def main() -> None:
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(asked.get("threads", torch.get_num_threads()))
    torch.manual_seed(asked["seed"])
    print(json.dumps([asdict(row) for row in measured(Shape(**asked["shape"]), asked["rounds"])]))


if __name__ == "__main__":
    main()

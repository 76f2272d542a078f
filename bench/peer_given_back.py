"""PEER beside the public package in a process that gives freed memory back to the system, as most programs do.

`bench.harness` keeps freed memory on all sides, as our training does. The package's gathered rows, and its gradients of
whole tables, are then no new pages in every call, which they are for its users. `bench.peer` runs `given_back` in
a process of its own for each size; both sides are timed there, in one race.
"""

import torch

from bench.harness import Row, agree
from bench.peer import OURS, PACKAGE, Shape, agreeing_steps, duel, experts_alone, pair, under

GIVEN_BACK = ", freed memory given back"


def given_back(shape: Shape, rounds: int) -> list[Row]:
    """Forward, of the layer and of its experts, and training step at one size."""
    ours, theirs = pair(shape, sparse_gradients=True)
    x = torch.randn(shape.tokens, shape.d)
    run_ours, run_theirs = (lambda: ours(x)[0]), (lambda: theirs(x[None])[0])
    with torch.no_grad():
        for name in OURS:
            agree(f"{shape.case}, {name}, output", under(name, run_ours)(), run_theirs(), 1e-4)
        rows = duel(shape.case, f"forward{GIVEN_BACK}", run_ours, PACKAGE, run_theirs, rounds)
        rows += experts_alone(shape, ours, x, f"experts alone, forward{GIVEN_BACK}", rounds)
    steps = agreeing_steps(shape, ours, theirs, x)
    return rows + duel(shape.case, f"training step{GIVEN_BACK}", steps[0], f"{PACKAGE} + AdamW", steps[1], rounds)

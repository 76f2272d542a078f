"""PEER beside the public package in a process that gives freed memory back to the system, as most programs do.

`bench.harness` keeps freed memory on all sides, as our training does. The package's gathered rows, and its gradients of
whole tables, are then no new pages in every call, which they are for its users. `bench.peer` runs `given_back` in
a process of its own for each size; both sides are timed there, in one race.
"""

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor

from bench.harness import Row, agree, clock, compare
from bench.peer import OURS, PACKAGE, Shape, agreeing_steps, duel, experts_alone, pair, under
from bench.peer_narrow import OURS_OFF
from moestro.experts import quantize_banks
from moestro.layers import MoELayer
from moestro.ops import native

GIVEN_BACK = ", freed memory given back"


def given_back(shape: Shape, rounds: int) -> list[Row]:
    """Forward, of the layer, of the layer with tables in 8 bits and of its experts, and training step at one size."""
    ours, theirs = pair(shape, sparse_gradients=True)
    x = torch.randn(shape.tokens, shape.d)
    run_ours, run_theirs = (lambda: ours(x)[0]), (lambda: theirs(x[None])[0])
    with torch.no_grad():
        for name in OURS:
            agree(f"{shape.case}, {name}, output", under(name, run_ours)(), run_theirs(), 1e-4)
        rows = duel(shape.case, f"forward{GIVEN_BACK}", run_ours, PACKAGE, run_theirs, rounds)
        rows += in_8_bits(shape, ours, run_theirs, x, rounds)
        rows += experts_alone(shape, ours, x, f"experts alone, forward{GIVEN_BACK}", rounds)
    steps = agreeing_steps(shape, ours, theirs, x)
    return rows + duel(shape.case, f"training step{GIVEN_BACK}", steps[0], f"{PACKAGE} + AdamW", steps[1], rounds)


def in_8_bits(shape: Shape, ours: MoELayer, run_theirs: Callable[[], Tensor], x: Tensor, rounds: int) -> list[Row]:
    """A forward pass with tables in int8 beside the package in float32; none without the native kernels."""
    if native.library().handle is None:
        return []
    eighth = deepcopy(ours)
    quantize_banks(eighth)
    agree(f"{shape.case}, tables in int8, output", eighth(x)[0], run_theirs(), OURS_OFF)
    times = clock({"ours": lambda: eighth(x)[0], PACKAGE: run_theirs}, rounds)
    return compare(shape.case, f"forward, our tables in int8{GIVEN_BACK}", times)

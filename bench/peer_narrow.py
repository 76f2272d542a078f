"""PEER with tables in fewer bits, beside the public package as it is and converted to bfloat16.

Most of what a pass waits for are the bytes of its rows. Ours keeps bfloat16 tables (`train.table_precision`) or 8 bits
with a scale for every row (`QuantizedBank`); queries, keys, gates and sums stay float32. The
package has one precision for everything: in bfloat16 its scores are rounded, too, and near the last place it chooses
other experts, so its output agrees less well than tables in 8 bits do. `bench.peer` adds these rows to its own.
"""

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor, nn

from bench.harness import Row, agree, clock, compare
from bench.peer import PACKAGE, Shape, our_step, pair, their_step
from moestro.experts import quantize_banks
from moestro.layers import MoELayer
from moestro.ops import native
from moestro.train.memory import keep_freed_memory
from moestro.train.tables import narrow

ROUNDED = f"{PACKAGE}, all of it in bfloat16"
# Of the norm of the package's float32 output, or of its change by a step: a number of a table changes by about two of
# its last places, and is rounded to one of its neighbours.
OURS_OFF, THEIRS_OFF, STEP_OFF, INT8_STEP_OFF = 2e-2, 0.5, 0.2, 0.3


def in_fewer_bits(shape: Shape, rounds: int) -> list[Row]:
    """Forward and a training step with tables in bfloat16 and int8; none without the native kernels. `bench.peer` runs
    this in a process of its own, because the greatest tables need that memory afterwards; freed memory is kept in it as
    there."""
    keep_freed_memory()
    if native.library().handle is None:
        return []
    ours, theirs = pair(shape, sparse_gradients=True)
    x = torch.randn(shape.tokens, shape.d)
    eighth = deepcopy(ours)
    quantize_banks(eighth)
    eighth.bank.sparse_gradients = True
    for table in ours.bank.row_parameters():
        narrow(table)
    rounded = deepcopy(theirs).bfloat16()
    kinds = {"bfloat16": ours, "int8": eighth}
    with torch.no_grad():
        rows = forwards(shape, kinds, theirs, rounded, x, rounds)
    return rows + steps(shape, kinds, theirs, rounded, x, rounds)


def forwards(
    shape: Shape, ours: dict[str, MoELayer], theirs: nn.Module, rounded: nn.Module, x: Tensor, rounds: int
) -> list[Row]:
    """Ours with each kind of tables beside the package in both precisions."""
    peers: dict[str, Callable] = {PACKAGE: lambda: theirs(x[None])[0], ROUNDED: lambda: rounded(x[None].bfloat16())[0]}
    want = peers[PACKAGE]()
    agree(f"{shape.case}, {ROUNDED}, output", peers[ROUNDED](), want, THEIRS_OFF)
    rows = []
    for name, layer_of in ours.items():
        agree(f"{shape.case}, tables in {name}, output", layer_of(x)[0], want, OURS_OFF)
        times = clock({"ours": lambda layer_of=layer_of: layer_of(x)[0], **peers}, rounds)
        rows += compare(shape.case, f"forward, our tables in {name}", times)
    return rows


def steps(
    shape: Shape, ours: dict[str, MoELayer], theirs: nn.Module, rounded: nn.Module, x: Tensor, rounds: int
) -> list[Row]:
    """Training steps. The first changes the output of ours in bfloat16 as it does the package's; in int8 numbers change
    by less than codes are apart, and a single step's rounding moves a few choices of experts: outputs agree roughly."""
    mine, peer = {name: our_step(layer, x) for name, layer in ours.items()}, their_step(theirs, x)
    before = ours["bfloat16"](x)[0].detach(), theirs(x[None])[0].detach()
    for step in (*mine.values(), peer):
        step()
    after = {name: layer(x)[0].detach() for name, layer in ours.items()}, theirs(x[None])[0].detach()
    change = after[0]["bfloat16"] - before[0]
    agree(f"{shape.case}, tables in bfloat16, change by a step", change, after[1] - before[1], STEP_OFF)
    agree(f"{shape.case}, tables in int8, output after a step", after[0]["int8"], after[1], INT8_STEP_OFF)
    peers = {f"{PACKAGE} + AdamW": peer, f"{ROUNDED} + AdamW": their_step(rounded, x.bfloat16())}
    rows = []
    for name, step in mine.items():
        rows += compare(shape.case, f"training step, our tables in {name}", clock({"ours": step, **peers}, rounds))
    return rows

"""Tables of one-neuron experts over ranks, by rows and by columns: the numbers of one process, to the optimizer's."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moestro import GLUSingletonBank, MoELayer, ProductKeyRouter, SingletonBank
from moestro.experts import RaggedBank, TableBank, ValueBank
from moestro.ops.row_gradients import collect_factors, row_gradient
from moestro.parallel.collectives import summed
from moestro.parallel.exchange import Network
from moestro.parallel.gradients import common_norm
from moestro.parallel.layout import own_layout
from moestro.parallel.ranks import Ranks
from moestro.parallel.row_tables import ColumnParallel, RowParallel
from moestro.routers.query_norm import BatchQueryNorm
from moestro.train.row_adamw import RowAdamW
from tests.parallel.processes import in_ranks
from tests.tolerances import FLOAT64

close = torch.testing.assert_close
D, E, STEPS = 8, 25, 3
# tokens of every rank in every step: unequal, one, none
SHARES = {2: [(9, 5), (14, 0), (1, 13)], 4: [(3, 5, 0, 6), (14, 0, 0, 0), (1, 1, 11, 1)]}
BANKS = {
    "singleton": lambda: SingletonBank(D, E, sparse_gradients=True),
    "gated": lambda: GLUSingletonBank(D, E, sparse_gradients=True),
    "value": lambda: ValueBank(D, E, sparse_gradients=True),
    "ragged": lambda: RaggedBank(D, [1, 2, 4, 1, 3] * 5, sparse_gradients=True),
}


def peer(kind: str) -> MoELayer:
    torch.manual_seed(3)
    return MoELayer(ProductKeyRouter(D, E, heads=2, top_k=3, d_key=4), [BANKS[kind]()]).double()


def spread(moe: MoELayer, way: str) -> MoELayer:
    bank: Any = moe.bank
    assert isinstance(bank, TableBank)
    moe.branches[0] = RowParallel(bank, Network()) if way == "rows" else ColumnParallel(bank)
    for norm in (module for module in moe.modules() if isinstance(module, BatchQueryNorm)):
        norm.together = summed
    return moe


class Steps:
    """Training steps of a layer on a part of every batch: all its state is in `seen`."""

    def __init__(self, moe: MoELayer, skipped: Any, fused: bool, ranks: Ranks) -> None:
        self.moe, self.ranks, self.seen = moe, ranks, {}
        tables = moe.bank.row_parameters()
        if fused:
            collect_factors(tables)
        self.dense = [p for p in moe.parameters() if all(p is not table for table in tables)]
        self.sgd = torch.optim.SGD(self.dense, lr=0.1)
        self.rows = RowAdamW(tables, lr=0.1, weight_decay=0.1, skipped=skipped)

    def step(self, number: int, x: Tensor, rows: slice) -> None:
        x = x[rows].requires_grad_()
        y, _ = self.moe(x)
        factor = torch.linspace(-1, 1, 14 * D, dtype=torch.float64).view(14, D)[rows]
        (y * factor).sum().backward()
        for parameter in self.dense:
            if self.ranks.several:
                dist.all_reduce(parameter.grad)
        gradients = [(table, row_gradient(table)) for table in self.moe.bank.row_parameters()]
        norms = [(table, gradient.norm()) for table, gradient in gradients if gradient is not None]
        self.seen |= {f"y {number}": y.detach(), f"x {number}": x.grad}
        self.seen[f"norm {number}"] = common_norm(self.dense, norms, self.ranks).double()
        for optimizer in (self.sgd, self.rows):
            optimizer.step()
            optimizer.zero_grad()


def batch(number: int) -> Tensor:
    return torch.randn(14, D, dtype=torch.float64, generator=torch.Generator().manual_seed(number))


def compare(rank: int, n_ranks: int, kind: str, way: str, skipped: Any, fused: Any) -> None:
    alone = Steps(peer(kind), skipped, fused, Ranks.alone())
    ours = Steps(spread(peer(kind), way), skipped, fused, Ranks(torch.device("cpu"), rank, n_ranks))
    for number, shares in enumerate(SHARES[n_ranks]):
        rows = slice(sum(shares[:rank]), sum(shares[: rank + 1]))
        alone.step(number, batch(number), slice(0, 14))
        ours.step(number, batch(number), rows)
        for what in ("y", "x"):
            close(ours.seen[f"{what} {number}"], alone.seen[f"{what} {number}"][rows], **FLOAT64)
        close(ours.seen[f"norm {number}"], alone.seen[f"norm {number}"], rtol=1e-6, atol=0)
    same_tables(ours, alone)


def same_tables(ours: Steps, alone: Steps) -> None:
    whole = dict(alone.moe.named_parameters())
    for name, parameter in ours.moe.named_parameters():
        layout = own_layout(parameter)
        if layout is None:
            close(parameter, whole[name], **FLOAT64)
            continue
        (piece,) = layout.pieces
        close(parameter[piece.in_own], whole[name][piece.in_whole], **FLOAT64)
        assert parameter.numel() < whole[name].numel()
        for entry, value in ours.rows.state[parameter].items():
            expected = alone.rows.state[whole[name]][entry]
            assert value.ndim or entry in ("step", "log_decay")
            close(value, expected[piece.in_whole[: value.ndim]] if value.ndim else expected, **FLOAT64)


def every_case(rank: int, n_ranks: int) -> None:
    plain = [("singleton", "keep", False), ("singleton", "decay", False)]
    for way, case in product(("rows", "columns"), [*plain, *((kind, "keep", True) for kind in BANKS)]):
        try:
            compare(rank, n_ranks, case[0], way, *case[1:])
        except Exception as error:
            raise AssertionError(f"{case} by {way}") from error


@pytest.mark.parametrize("n_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_training_equals_that_of_one_process(n_ranks: int, tmp_path: Path) -> None:
    in_ranks(n_ranks, lambda rank: every_case(rank, n_ranks), tmp_path)


def refused(rank: int) -> None:
    with pytest.raises(ValueError, match="tables of d_model=7 columns on 2 ranks"):
        ColumnParallel(SingletonBank(7, 9))
    with pytest.raises(ValueError, match="a table of 1 experts on 2 ranks"):
        RowParallel(SingletonBank(7, 1), Network())
    norm = BatchQueryNorm(heads=2, d_key=4)
    norm.together = summed
    with pytest.raises(ValueError, match="at least 2 tokens in a training batch, got 1 on all ranks together"):
        norm(torch.randn(1 if rank == 0 else 0, 8))
    assert len(norm(torch.randn(1, 8))[0]) == 1  # two tokens, one on each rank
    assert len(norm(torch.randn(0, 8))[0]) == 0


def test_the_impossible_is_refused(tmp_path: Path) -> None:
    in_ranks(2, refused, tmp_path)

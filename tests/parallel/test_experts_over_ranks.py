"""Experts on several ranks compute what they compute on one: outputs, and every gradient."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moestro.layers import MoELayer
from moestro.parallel.exchange import Network
from moestro.parallel.expert_parallel import ExpertParallel
from moestro.parallel.layout import own_layout
from moestro.parallel.placement import Placement
from tests.parallel.processes import in_ranks
from tests.properties.test_pairs import T, gradients, layer, tokens
from tests.tolerances import FLOAT64

close = torch.testing.assert_close
# what a token's routing depends on, the token alone: any split of a batch is the batch
FEED_FORWARD = ["ffn", "stacked", "clamped", "biased_ffn", "constant", "low_rank"]
TABLES = ["singleton", "glu_singleton", "value", "ragged"]
PAIRS = [
    *[(router, kind) for router in ("linear-top_k", "linear-top_p") for kind in FEED_FORWARD],
    *[(router, kind) for router in ("softmax", "linear-relu") for kind in ("ffn", *TABLES)],
]
# expert 2 of the feed-forward banks has width 0
UNEQUAL = {2: (0, 1, 1, 0, 1, 0, 1, 1, 0), 4: (3, 0, 1, 1, 0, 3, 2, 0, 1)}
# tokens of every rank: unequal, and none at all
SHARES = {2: [(17, 6), (23, 0)], 4: [(9, 0, 13, 1)]}


def spread(moe: MoELayer, n_ranks: int) -> MoELayer:
    """The same layer, its experts placed unequally on all ranks."""
    moe.branches[0] = ExpertParallel(moe.bank, Placement(UNEQUAL[n_ranks], n_ranks), Network())
    return moe


def own_rows(rank: int, shares: tuple[int, ...]) -> slice:
    return slice(sum(shares[:rank]), sum(shares[: rank + 1]))


def weighted(y: Tensor, rows: slice) -> Tensor:
    """A rank's part of the loss of `gradients`."""
    factor = torch.linspace(-1, 1, T * y.shape[1], dtype=y.dtype).view(T, -1)
    return (y * factor[rows]).sum()


def in_whole(parameter: Tensor, whole: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks of a rank's gradient beside those of the whole one; None stands for zeros."""
    own, layout = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad, own_layout(parameter)
    assert layout is not None and layout.shape == whole.shape
    assert sum(torch.Size(piece.size).numel() for piece in layout.pieces) == own.numel()
    for piece in layout.pieces:
        yield own[piece.in_own], whole[piece.in_whole]


def equals_one_process(rank: int, n_ranks: int, router: str, kind: str, shares: tuple[int, ...]) -> None:
    alone, x = layer(router, kind), tokens().requires_grad_()
    y, (trace,) = alone(x)
    want = {name: torch.zeros(()) if g is None else g for name, g in gradients(alone, x, y).items()}
    moe, rows = spread(layer(router, kind), n_ranks), own_rows(rank, shares)
    part = tokens()[rows].requires_grad_()
    own, (own_trace,) = moe(part)
    close(own, y[rows], **FLOAT64)
    weighted(own, rows).backward()
    close(part.grad, want["x"][rows], **FLOAT64)
    for name, parameter in moe.named_parameters():
        layout, expected = own_layout(parameter), want[name].to(parameter)
        if layout is None:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(gradient)
            close(gradient, expected.expand_as(gradient), **FLOAT64)
        else:
            for a, b in in_whole(parameter, expected.expand(layout.shape)):
                close(a, b, **FLOAT64)
    flops = torch.tensor([float(own_trace.flops().useful)])
    dist.all_reduce(flops)
    close(flops.item(), float(trace.flops().useful), rtol=1e-6, atol=0)


def every_pair(rank: int, n_ranks: int) -> None:
    for router, kind in PAIRS:
        for shares in SHARES[n_ranks]:
            try:
                equals_one_process(rank, n_ranks, router, kind, shares)
            except Exception as error:
                raise AssertionError(f"{router} with {kind}, tokens {shares}") from error


@pytest.mark.parametrize("n_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_outputs_and_gradients_equal_those_of_one_process(n_ranks: int, tmp_path: Path) -> None:
    in_ranks(n_ranks, lambda rank: every_pair(rank, n_ranks), tmp_path)

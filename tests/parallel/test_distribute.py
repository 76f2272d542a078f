"""Whole models whose banks are spread over ranks, what that sends, and what cannot be spread."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moestro import FFNBank, LinearScore, MoELayer, ProductKeyRouter, ScoredRouter, SharedExpert, SingletonBank, TopK
from moestro.experts import ConstantBank, CopyBank, ExpertBank, MixedBank, MPOBank, RaggedBank
from moestro.layers import StratifiedLayer
from moestro.parallel import ParallelSettings, Ranks
from moestro.parallel.distribute import distribute_experts, two_level
from moestro.parallel.exchange import Network, TwoLevelNetwork
from moestro.parallel.expert_parallel import ExpertParallel, SentTokens
from moestro.parallel.layout import own_layout
from moestro.parallel.placement import EqualCount, Placement
from moestro.parallel.ranks import joined
from moestro.parallel.row_tables import ColumnParallel, RowParallel
from moestro.parallel.traffic import Traffic
from moestro.routing import Routing
from tests.parallel.models import SYSTEMS, one_step
from tests.parallel.processes import in_ranks
from tests.tolerances import FLOAT64

close = torch.testing.assert_close
D, T, WIDTHS = 8, 20, [3, 5, 0, 8, 1, 2]
SHARES = {2: (13, 7), 4: (5, 0, 13, 2)}


class Model(nn.Module):
    """Layers of every kind, one after another, with residuals."""

    def __init__(self, layers: list[Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            y, _ = layer(x)
            x = y if layer.owns_residual else x + y  # type: ignore[union-attr]
        return x


def router(n_experts: int) -> ScoredRouter:
    return ScoredRouter(LinearScore(D, n_experts, init_std=1.0), TopK(2))


def every_kind() -> Model:
    torch.manual_seed(5)
    mixed = MixedBank([FFNBank(D, [4, 2, 3, 1]), CopyBank(), ConstantBank(D), RaggedBank(D, [1, 2, 3, 1])])
    layers = [
        MoELayer(router(6), [FFNBank(D, WIDTHS), SharedExpert(D, 3)]),
        MoELayer(router(10), [mixed]),
        MoELayer(ProductKeyRouter(D, 16, heads=2, top_k=2, d_key=4), [SingletonBank(D, 16, sparse_gradients=True)]),
        # its passes are slices of one bank
        StratifiedLayer(D, [2, 3], router, [FFNBank(D, [3, 4, 5, 2, 6])]),
    ]
    return Model(layers).double()


def distributed(experts: int, **chosen: Any) -> Model:
    settings = ParallelSettings(experts=experts, **chosen)
    model = every_kind()
    distribute_experts(model, Ranks.grouped(torch.device("cpu"), settings), settings)
    return model


def batch() -> Tensor:
    return torch.randn(T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def same_as_alone(rank: int, model: Model) -> None:
    n_ranks = dist.get_world_size()
    rows = slice(sum(SHARES[n_ranks][:rank]), sum(SHARES[n_ranks][: rank + 1]))
    factor = torch.linspace(-1, 1, T * D, dtype=torch.float64).view(T, D)
    alone, x, part = every_kind(), batch().requires_grad_(), batch()[rows].requires_grad_()
    (alone(x) * factor).sum().backward()
    y = model(part)
    close(y, alone(x)[rows], **FLOAT64)
    (y * factor[rows]).sum().backward()
    assert x.grad is not None
    close(part.grad, x.grad[rows], **FLOAT64)
    whole = dict(alone.named_parameters())
    assert [name for name, _ in model.named_parameters()] == list(whole)
    for name, parameter in model.named_parameters():
        (gradient, layout) = whole[name].grad, own_layout(parameter)
        assert gradient is not None
        want = gradient.to_dense()
        have = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.to_dense()
        if layout is None or layout.copies is not None:
            dist.all_reduce(have, group=None if layout is None else layout.copies)
        for piece in () if layout is None else layout.pieces:
            close(have[piece.in_own], want[piece.in_whole], **FLOAT64)
        if layout is None:
            close(have, want, **FLOAT64)


def kinds(model: Model) -> list[type]:
    found = [module for module in model.modules() if isinstance(module, ExpertBank)]
    return [type(module) for module in found if not type(module).__name__.startswith("BankSlice")]


def two_ranks(rank: int) -> None:
    model = distributed(2)
    expected = [ExpertParallel, MixedBank, ExpertParallel, CopyBank, ConstantBank, RowParallel, RowParallel]
    assert kinds(model) == [*expected, ExpertParallel]
    same_as_alone(rank, model)
    assert kinds(distributed(1, tables="columns"))[-2:] == [ColumnParallel, FFNBank]
    same_as_alone(rank, distributed(2, tables="columns", placement=EqualCount()))
    counted(rank)
    fully_sharded()
    refused()


def counted(rank: int) -> None:
    """Bytes of a layer against the formula of `SentTokens`."""
    moe = MoELayer(
        router(6), [ExpertParallel(FFNBank(D, WIDTHS), Placement((0, 1, 1, 0, 1, 0), 2), Network())]
    ).double()
    x = batch()[: 13 if rank == 0 else 7].requires_grad_()
    with Traffic() as traffic:
        y, (trace,) = moe(x)
        y.sum().backward()
    there = torch.tensor([0, 1, 1, 0, 1, 0])[trace.routing.expert] != rank
    mine = torch.tensor([len(trace.routing.token[there].unique()), int(there.sum())])
    both = mine.clone()
    dist.all_reduce(both)
    (tokens, rows), (theirs, their_rows) = mine.tolist(), (both - mine).tolist()
    token_bytes = 2 * D * 8 * (tokens + theirs)
    assert traffic.sent["alltoall"] == token_bytes + (8 + 8) * rows + 8 * their_rows + 2 * 8
    assert traffic.calls == {"alltoall": 8} and traffic.total == traffic.sent["alltoall"]
    with Traffic() as traffic:
        dist.all_reduce(torch.zeros(6))
        dist.broadcast(torch.zeros(4), src=0)
        dist.all_gather([torch.zeros(2), torch.zeros(2)], torch.zeros(2))
        dist.barrier()
    assert traffic.sent == {"allreduce": 24, "broadcast": 8, "allgather": 8, "barrier": 0}


def fully_sharded() -> None:
    """FSDP's messages are counted, too: weights gathered twice, gradients scattered once, each to or from one rank."""
    with joined("cpu", ParallelSettings(sharding="full")) as ranks:
        with Traffic() as traffic:
            one_step("dense", ranks, ParallelSettings(sharding="full"))
        half = sum(parameter.numel() for parameter in SYSTEMS["dense"]()[0].parameters()) * 4 / 2
        assert half <= traffic.sent["reduce_scatter"] <= 1.2 * half
        assert half <= traffic.sent["allgather"] <= 2.4 * half


def refused() -> None:
    mpo = MoELayer(router(4), [MPOBank(D, 4, 4, width_factors=[2, 1, 2], d_factors=[2, 2, 2])])
    settings = ParallelSettings(experts=2)
    ranks = Ranks.grouped(torch.device("cpu"), settings)
    with pytest.raises(ValueError, match=r"layers\.0\.branches\.0: MPOBank: experts that share weights"):
        distribute_experts(Model([mpo]), ranks, settings)
    with pytest.raises(ValueError, match="n_ranks=2, allowed: 1 to 1"):
        distribute_experts(Model([MoELayer(router(2), [MixedBank([FFNBank(D, [3]), CopyBank()])])]), ranks, settings)
    with pytest.raises(ValueError, match="allowed: with experts above 1"):
        distribute_experts(every_kind(), ranks, ParallelSettings(placement=EqualCount()))
    with pytest.raises(ValueError, match="a placement of 2 experts on 2 ranks, here are 6 on 2"):
        ExpertParallel(FFNBank(D, WIDTHS), Placement((0, 1), 2), Network())
    spread = ExpertParallel(FFNBank(D, WIDTHS), Placement((0, 1, 1, 0, 1, 0), 2), Network())
    with pytest.raises(ValueError, match="cannot be reindexed"):
        spread.reindex(torch.arange(6))


def test_models_equal_those_of_one_process(tmp_path: Path) -> None:
    in_ranks(2, two_ranks, tmp_path)


def four_ranks(rank: int) -> None:
    same_as_alone(rank, distributed(4))
    # two copies of every expert
    model = distributed(2)
    assert own_layout(next(model.layers[0].bank.parameters())).n_copies == 2  # type: ignore[union-attr]
    same_as_alone(rank, model)


def two_hosts(rank: int) -> None:
    model = distributed(4)
    networks = [module.network for module in model.modules() if isinstance(module, SentTokens)]
    assert [type(network) for network in networks].count(TwoLevelNetwork) == 4
    same_as_alone(rank, model)
    generator = torch.Generator().manual_seed(rank)
    counts = torch.randint(0, 4, (4, 2), generator=generator)
    rows = torch.randn(int(counts[:, 1].sum()), 3, generator=generator)
    got = []
    for network in (Network(), two_level(4, 4, 2)):
        assert (network.rank, network.size) == (rank, 4)
        exchange = network.exchanges(counts)[1]
        there = exchange.begin(rows)()
        close(exchange.back(2 * there)(), 2 * rows)
        got.append((there, exchange.received))
    close(got[0][0], got[1][0])
    assert got[0][1] == got[1][1]


@pytest.mark.slow
def test_four_ranks_and_copies(tmp_path: Path) -> None:
    in_ranks(4, four_ranks, tmp_path)


@pytest.mark.slow
def test_rows_cross_hosts_by_two_hops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    in_ranks(4, two_hosts, tmp_path)


def test_other_branches_work_while_tokens_travel() -> None:
    happened = []

    class Sending(FFNBank):
        def begin(self, x: Tensor, routing: Routing) -> Any:
            happened.append("sent")
            return lambda: happened.append("received") or FFNBank.forward(self, x, routing)

    class Shared(SharedExpert):
        def forward(self, x: Tensor, routing: Routing | None = None) -> Tensor:
            happened.append("shared")
            return super().forward(x, routing)

    torch.manual_seed(0)
    layer = MoELayer(router(6), [Sending(D, WIDTHS), Shared(D, 3)]).double()
    y, (trace,) = layer(batch())
    assert happened == ["sent", "shared", "received"]
    bank, shared = layer.branches
    assert torch.equal(y, FFNBank.forward(bank, batch(), trace.routing) + shared(batch()))  # type: ignore[arg-type]

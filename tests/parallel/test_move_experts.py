"""Experts that move between ranks while they are trained."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moestro import FFNBank, LinearScore, MoELayer, ScoredRouter, TopK
from moestro.experts import BiasedFFNBank, CopyBank, ExpertBank, LowRankBank, MixedBank, StackedBank
from moestro.layers import StratifiedLayer
from moestro.parallel.exchange import Network
from moestro.parallel.expert_parallel import ExpertParallel
from moestro.parallel.layout import own_layout, whole
from moestro.parallel.moving import move
from moestro.parallel.placement import EqualCount, Placement, tokens_times_width
from moestro.train.move_experts import MoveExperts
from moestro.train.optim import Optimizers
from tests.parallel.processes import in_ranks
from tests.tolerances import FLOAT64

close = torch.testing.assert_close
D, T, WIDTHS = 6, 16, [9, 8, 1, 0, 2, 1]
BANKS = {
    "ffn": lambda: FFNBank(D, WIDTHS),
    "biased_ffn": lambda: BiasedFFNBank(D, WIDTHS),
    "stacked": lambda: StackedBank(D, 6, 3),
    "low_rank": lambda: LowRankBank(D, 6, rank=2, up_std=0.7),
    "mixed": lambda: MixedBank([CopyBank(2), FFNBank(D, [9, 8, 2, 1])]),
}


def layer(kind: str) -> MoELayer:
    torch.manual_seed(4)
    return MoELayer(ScoredRouter(LinearScore(D, 6, init_std=1.0), TopK(2)), [BANKS[kind]()]).double()


def spread(moe: MoELayer) -> MoELayer:
    """Consecutive experts on each rank: the wide ones on the first."""

    def placed(bank: ExpertBank) -> ExpertBank:
        return ExpertParallel(bank, EqualCount()([0.0] * bank.n_experts, [0.0] * bank.n_experts, 2), Network())

    if isinstance(moe.bank, MixedBank):
        moe.bank.banks[1] = placed(moe.bank.banks[1])  # type: ignore[arg-type]
    else:
        moe.branches[0] = placed(moe.bank)
    return moe


def spread_bank(moe: MoELayer) -> ExpertParallel:
    return next(module for module in moe.modules() if isinstance(module, ExpertParallel))


class Run:
    """A layer, its optimizer and its rule; a step on some rows of a batch."""

    def __init__(self, moe: MoELayer, **chosen: object) -> None:
        self.moe, self.rule, self.number = moe, MoveExperts(every=2, **chosen), 0  # type: ignore[arg-type]
        self.optimizer = Optimizers([torch.optim.AdamW(moe.parameters(), lr=0.1)])
        self.rule.start(moe, self.optimizer)

    def step(self, rows: slice) -> Tensor:
        self.number += 1
        x = torch.randn(T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(self.number))[rows]
        y, (trace,) = self.moe(x)
        y.square().sum().backward()
        self.rule.observe(trace)
        for parameter in self.moe.parameters():
            if own_layout(parameter) is None and len(x) < T:
                dist.all_reduce(parameter.grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.rule.apply(self.number)
        return y.detach()


def same(ours: Run, alone: Run) -> None:
    expected = dict(alone.moe.named_parameters())
    for name, parameter in ours.moe.named_parameters():
        close(whole(parameter), expected[name], **FLOAT64)
        layout, entries = own_layout(parameter), ours.optimizer.state[parameter]
        for entry, value in alone.optimizer.state[expected[name]].items():
            for piece in () if layout is None or not value.ndim else layout.pieces:
                close(entries[entry][piece.in_own], value[piece.in_whole], **FLOAT64)


def trains_alike(rank: int, kind: str) -> None:
    alone, ours = Run(layer(kind)), Run(spread(layer(kind)), gain=0.0)
    rows, placements = slice(0, 11) if rank == 0 else slice(11, T), []
    for _ in range(4):
        before = torch.get_rng_state()
        close(ours.step(rows), alone.step(slice(0, T))[rows], **FLOAT64)
        assert torch.equal(torch.get_rng_state(), before)
        placements.append(spread_bank(ours.moe).placement)
        same(ours, alone)
    assert len(set(placements)) > 1
    resumes(rank, kind, ours)


def resumes(rank: int, kind: str, ours: Run) -> None:
    """A run that begins with other placements, has read weights and moments, and then the rule's state."""
    again, placement, state = (
        Run(spread(layer(kind)), gain=0.0),
        spread_bank(ours.moe).placement,
        ours.rule.state_dict(),
    )
    move(spread_bank(ours.moe), spread_bank(again.moe).placement, ours.optimizer.state)
    for parameter, other in zip(again.moe.parameters(), ours.moe.parameters(), strict=True):
        parameter.data.copy_(other.data)
        entries = {entry: value.clone() for entry, value in ours.optimizer.state[other].items()}
        again.optimizer.parts[0].state[parameter] = entries
    again.rule.load_state_dict(state)
    move(spread_bank(ours.moe), placement, ours.optimizer.state)
    again.number, rows = ours.number, slice(0, 11) if rank == 0 else slice(11, T)
    assert spread_bank(again.moe).placement == placement
    for _ in range(2):
        assert torch.equal(again.step(rows), ours.step(rows))
    for mine, theirs in zip(again.moe.parameters(), ours.moe.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def to_the_bit(rank: int) -> None:
    run = Run(spread(layer("ffn")))
    run.step(slice(0, 8) if rank == 0 else slice(8, T))
    bank = spread_bank(run.moe)
    kept = {name: whole(parameter).clone() for name, parameter in bank.named_parameters()}
    objects, sizes = list(bank.parameters()), [len(parameter) for parameter in bank.parameters()]
    move(bank, Placement((1, 0, 0, 1, 1, 0), 2), run.optimizer.state)
    assert all(a is b for a, b in zip(bank.parameters(), objects, strict=True))
    assert [len(parameter) for parameter in bank.parameters()] != sizes
    assert {
        entry for p in objects for entry, v in run.optimizer.state[p].items() if v.ndim and len(v) != len(p)
    } == set()
    assert all(torch.equal(whole(parameter), kept[name]) for name, parameter in bank.named_parameters())


def balances(rank: int) -> None:
    run = Run(spread(layer("ffn")))
    for number in range(1, 3):
        bank = spread_bank(run.moe)
        before, work = bank.placement, None
        run.step(slice(0, 8) if rank == 0 else slice(8, T))
        if number == 1:
            first = run.rule.loads[bank].clone()
    assert float(first.sum()) == 2 * T and not run.rule.loads[bank].any()
    work = tokens_times_width(first.tolist(), [float(width) for width in WIDTHS])
    assert bank.placement != before and bank.placement.imbalance(work) < before.imbalance(work)
    idle = Run(spread(layer("ffn")), gain=0.99)
    idle.step(slice(0, 8) if rank == 0 else slice(8, T))
    idle.rule.skip(2)
    assert spread_bank(idle.moe).placement == before


def two_ranks(rank: int) -> None:
    for kind in BANKS:
        trains_alike(rank, kind)
    to_the_bit(rank)
    balances(rank)


def test_training_goes_on_as_if_nothing_had_moved(tmp_path: Path) -> None:
    in_ranks(2, two_ranks, tmp_path)


def test_alone_it_does_nothing() -> None:
    run = Run(layer("ffn"))
    before = [run.step(slice(0, T)) for _ in range(2)]
    assert before and run.rule.state_dict() == {"placements": [], "loads": []}
    run.rule.load_state_dict({"placements": [{"rank": [0, 1], "ranks": 2}], "loads": [torch.zeros(2)]})


def slices(rank: int) -> None:
    """Both passes of a stratified layer meet one bank."""
    torch.manual_seed(0)
    bank = ExpertParallel(FFNBank(D, WIDTHS), EqualCount()(WIDTHS, WIDTHS, 2), Network())
    moe = StratifiedLayer(
        D, [2, 4], lambda n_experts: ScoredRouter(LinearScore(D, n_experts, init_std=1.0), TopK(2)), [bank]
    )
    rule = MoveExperts(every=5)
    rule.start(moe, Optimizers([]))
    _, traces = moe(torch.randn(5 + rank, D))
    want = torch.zeros(6, dtype=torch.float64)
    for first, trace in zip((0, 2), traces, strict=True):
        want[first:] += trace.routing.load()
        rule.observe(trace)
    dist.all_reduce(want)
    rule.apply(1)
    assert torch.equal(rule.loads[bank], want)


def test_slices_of_a_bank_count_for_the_bank(tmp_path: Path) -> None:
    in_ranks(2, slices, tmp_path)


@pytest.mark.parametrize(("chosen", "message"), [({"every": 0}, "every=0"), ({"every": 1, "gain": 1.0}, "gain=1.0")])
def test_the_impossible_is_refused(chosen: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoveExperts(**chosen)

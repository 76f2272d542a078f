"""Pieces of tensors that ranks hold: written and read again, put together, agreed upon."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moestro import FFNBank
from moestro.parallel import ParallelSettings, Ranks
from moestro.parallel.distribute import network_of_experts
from moestro.parallel.exchange import Network
from moestro.parallel.expert_parallel import ExpertParallel
from moestro.parallel.layout import Layout, Piece, lay_out, own_layout, whole
from moestro.parallel.placement import EqualCount
from moestro.parallel.storage import Held, read_pieces, save_pieces
from tests.parallel.processes import in_ranks

WIDTHS = [0, 3, 2, 0]


def written_and_read(rank: int, folder: Path) -> None:
    """An expert of no width begins where the next one does, on another rank."""
    torch.manual_seed(0)
    alone = FFNBank(4, WIDTHS)
    bank = FFNBank(4, WIDTHS)
    bank.load_state_dict(alone.state_dict())
    spread = ExpertParallel(bank, EqualCount()(WIDTHS, WIDTHS, 4), Network())
    held = {name: Held.copied(parameter) for name, parameter in spread.named_parameters()}
    save_pieces(folder / "saved", {"model": held}, rank, dist.new_group(backend="gloo"))
    dist.barrier()
    wanted = {name: (own_layout(p), tuple(p.shape), p.dtype) for name, p in spread.named_parameters()}
    found = read_pieces(folder / "saved", "model", wanted)
    for name, parameter in spread.named_parameters():
        assert torch.equal(found[name], parameter), name
        assert torch.equal(whole(parameter), alone.get_parameter(name)), name


def copied_to_the_bit(rank: int, _: Path) -> None:
    """Three copies of a number, added and divided, are not always that number."""
    numbers = torch.rand(1000, 2, generator=torch.Generator().manual_seed(1))
    own = numbers.clone()
    group = dist.new_group([0, 1, 2])
    if rank == 3:
        group, own = None, torch.empty(0, 2)
    pieces = (Piece((0, 0), (0, 0), (1000, 2)),) if rank < 3 else ()
    lay_out(own, Layout((1000, 2), pieces, group))
    assert torch.equal(whole(own), numbers)


def hosts_of_unequal_size(rank: int, _: Path) -> None:
    """Ranks that would decide each for itself would wait for groups that others do not make."""
    os.environ["LOCAL_WORLD_SIZE"] = ["2", "2", "1", "1"][rank]
    settings = ParallelSettings(experts=4)
    network = network_of_experts(Ranks.grouped(torch.device("cpu"), settings), settings)
    assert type(network) is Network and network.exchanges(torch.ones(4, 1, dtype=torch.long))[0].received == [1] * 4


@pytest.mark.parametrize("work", [written_and_read, copied_to_the_bit, hosts_of_unequal_size])
def test_pieces(work, tmp_path: Path) -> None:
    in_ranks(4, lambda rank: work(rank, tmp_path), tmp_path / "ranks")


@pytest.mark.parametrize("seconds", [0.0, float("inf"), float("nan"), 1e12])
def test_waiting_has_an_end(seconds: float) -> None:
    with pytest.raises(ValueError, match="timeout_s=.*: must be above 0, at most 31536000 .a year."):
        ParallelSettings(timeout_s=seconds)

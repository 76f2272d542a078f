"""Formulas of messages beside bytes that are counted one by one."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moestro import GLUSingletonBank, SingletonBank
from moestro.experts import TableBank, ValueBank
from moestro.parallel.exchange import Network
from moestro.parallel.expert_parallel import Parcels
from moestro.parallel.row_tables import ColumnParallel, RowParallel
from moestro.parallel.traffic import Traffic
from moestro.plan import traffic
from moestro.plan.imbalance import even
from moestro.routing import SparseRouting
from tests.parallel.processes import in_ranks


def ring(n: int, ranks: int, rounds: int) -> list[float]:
    """Bytes that every rank sends when it passes a piece of n / ranks on in every round."""
    sent = [0.0] * ranks
    for _, rank in itertools.product(range(rounds), range(ranks)):
        sent[rank] += n / ranks
    return sent


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_collectives_send_what_a_ring_sends(ranks: int):
    assert ring(4800, ranks, ranks - 1) == [traffic.all_gather(4800, ranks)] * ranks
    assert ring(4800, ranks, ranks - 1) == [traffic.reduce_scatter(4800, ranks)] * ranks
    assert ring(4800, ranks, 2 * (ranks - 1)) == [traffic.all_reduce(4800, ranks)] * ranks


def test_weights_are_gathered_once_or_in_every_backward_pass():
    assert traffic.gathers(accumulate=1, reshard=True) == 2
    assert traffic.gathers(accumulate=4, reshard=True) == 5
    assert traffic.gathers(accumulate=4, reshard=False) == 1


def test_ranks_that_a_token_meets_are_those_of_every_draw():
    shares, rows = (0.5, 0.3, 0.2), 2
    met = 0.0
    for own in range(3):
        for ranks in itertools.product(range(3), repeat=rows):
            chance = math.prod(shares[rank] for rank in ranks)
            met += chance * len({*ranks} - {own}) / 3
    assert traffic.ranks_met(rows, shares) == pytest.approx(met)


def test_experts_of_a_token_are_different():
    rank, rows, met = [0, 0, 0, 1, 1, 2], 3, 0.0
    draws = list(itertools.combinations(range(6), rows))
    for own in range(3):
        met += sum(len({rank[expert] for expert in draw} - {own}) for draw in draws) / len(draws) / 3
    assert traffic.ranks_met(rows, (1 / 2, 1 / 3, 1 / 6), n_experts=6) == pytest.approx(met)
    assert traffic.ranks_met(6, (0.5, 0.5), n_experts=6) == 1
    assert 0.5 < traffic.ranks_met(1.5, (0.5, 0.5), n_experts=8) < traffic.ranks_met(2, (0.5, 0.5), n_experts=8)


@pytest.mark.parametrize(("ranks", "top_k"), [(2, 1), (4, 2), (8, 8)])
def test_an_exchange_moves_the_parcels_that_the_layer_packs(ranks: int, top_k: int):
    torch.manual_seed(0)
    tokens, d, n_experts = 4000, 16, 64
    expert = torch.randint(n_experts, (tokens * top_k,))
    token = torch.arange(tokens).repeat_interleave(top_k)
    routing = SparseRouting(token, expert, torch.rand(len(token)), tokens, n_experts)
    rank = expert % ranks
    sent = []
    for own in range(ranks):
        counts = Parcels.of(routing, rank, expert // ranks, torch.full_like(rank, n_experts // ranks), ranks).counts
        counts[own] = 0
        parcels, rows = counts.sum(0).tolist()
        sent.append(4 * parcels * d * 4 + rows * (8 + 4 + 4) + 2 * 8 * (ranks - 1))
    formula = traffic.expert_exchange(tokens, d, top_k, even(ranks), itemsize=4)
    assert formula == pytest.approx(sum(sent) / ranks, rel=0.02)


def test_wide_rows_travel_less_in_columns_and_many_ranks_hear_less_of_rows():
    wide = [by(64, 4096, 128, 4, 4) for by in (traffic.table_rows_exchange, traffic.table_columns_exchange)]
    many = [by(64, 64, 128, 64, 4) for by in (traffic.table_rows_exchange, traffic.table_columns_exchange)]
    assert wide[1] < wide[0] and many[1] > many[0]
    assert traffic.table_rows_exchange(64, 256, 128, 1, 4) == 0
    assert traffic.table_columns_exchange(64, 256, 128, 1, 4) == 0


TOKENS, ROWS, WIDTH, TABLE = 200, 6, 32, 600


def sent_by(bank: TableBank, by_rows: bool, recompute: bool) -> float:
    """Bytes that this rank sends for a layer's tables, forward and backward."""
    spread: Any = RowParallel(bank, Network()) if by_rows else ColumnParallel(bank)
    draw = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(TABLE, generator=draw)[:ROWS] for _ in range(TOKENS)])
    x, weight = torch.randn(TOKENS, WIDTH, requires_grad=True), torch.rand(TOKENS, ROWS, requires_grad=True)

    def layer(x: Any, weight: Any) -> Any:
        return torch.tanh(spread(x, SparseRouting.from_topk(ids, weight, TABLE)))

    with Traffic() as counted:
        y: Any = checkpoint(layer, x, weight, use_reentrant=False) if recompute else layer(x, weight)
        y.sum().backward()
    return counted.total


def tables_send(rank: int) -> None:
    for kind, n_tables in ((SingletonBank, 2), (GLUSingletonBank, 3), (ValueBank, 1)):
        for by_rows, recompute in itertools.product((True, False), (False, True)):
            formula = traffic.table_rows_exchange if by_rows else traffic.table_columns_exchange
            want = formula(TOKENS, WIDTH, ROWS, 2, 4, n_tables, 2 if recompute else 1)
            have = sent_by(kind(WIDTH, TABLE, sparse_gradients=True), by_rows, recompute)
            assert have == pytest.approx(want, rel=0.005), (kind, by_rows, recompute)


def test_tables_over_ranks_send_what_the_formulas_say(tmp_path: Path):
    in_ranks(2, tables_send, tmp_path)


def test_statistics_of_queries_are_mean_and_spread():
    assert traffic.query_statistics(10, 2) == (2 * 10 + 1) * 4
    assert traffic.pooled_statistics(10, 2) == (2 * 10 + 1) * 8
    assert traffic.query_statistics(0, 2) == traffic.pooled_statistics(0, 2) == 0

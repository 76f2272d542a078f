"""`ExpertParallel`: a bank of which every rank of a group holds some experts."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moestro.experts import ExpertBank
from moestro.ops.precision import compute_dtype
from moestro.parallel.exchange import Arrival, Exchange, Network
from moestro.parallel.layout import Layout, row_pieces
from moestro.parallel.placement import Placement
from moestro.parallel.spread_bank import SpreadBank
from moestro.routing import SparseRouting


class SentTokens(SpreadBank):
    """A bank whose experts lie on several ranks, to which tokens are sent.

    A token is sent once to every rank that has some of its experts, with their numbers and gates; there the bank of
    that rank's experts computes as it would in a layer, and one sum comes back. A token that meets experts on m other
    ranks moves 2 m d numbers forward and 2 m d backward, however many experts it meets there, besides 8 bytes and a
    gate (and its gradient) for each row. Rows are never dropped; ranks may have no tokens, experts no rows.
    """

    def __init__(self, bank: ExpertBank, network: Network, copies: Any = None) -> None:
        super().__init__(bank)
        self.network, self.copies = network, copies

    def sent(self, x: Float[Tensor, "t d"], routing: SparseRouting) -> Arrival:
        return _sent(self, x.to(compute_dtype(x)), routing)  # type: ignore[call-arg]

    def whereabouts(self, expert: Int[Tensor, "n"]) -> tuple[Tensor, Tensor, Tensor]:
        """Of every expert in `expert` the rank, its number there and how many experts that rank has."""
        raise NotImplementedError

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """This rank's experts: the first and last of those that follow one another, and the first's number here."""
        raise NotImplementedError

    def layout(self, name: str) -> Layout:
        """One piece for experts that follow one another."""
        places = []
        for first, last, number in self.runs():
            there = rows_of(self.whole, name, first).start, rows_of(self.whole, name, last).stop
            start = rows_of(self.own, name, number).start
            places.append((slice(*there), slice(start, start + there[1] - there[0])))
        return row_pieces(places, self.whole.get_parameter(name).shape, self.copies)


class ExpertParallel(SentTokens):
    """The experts of `bank`, each on the rank that `placement` says: this rank keeps its own, the others go. Ranks that
    hold the same experts are `copies`, a process group, where there are such.

    Experts whose weights belong to several of them, or to several layers, cannot be spread.

    Raises: ValueError where the bank cannot be spread, or the placement is of other experts or ranks.
    """

    def __init__(self, bank: ExpertBank, placement: Placement, network: Network, copies: Any = None) -> None:
        require_spreadable(bank)
        if len(placement.rank) != bank.n_experts or placement.n_ranks != network.size:
            raise ValueError(
                f"a placement of {len(placement.rank)} experts on {placement.n_ranks} ranks, "
                f"here are {bank.n_experts} on {network.size}"
            )
        super().__init__(bank, network, copies)
        device = next(bank.parameters()).device
        bank.reindex(torch.tensor(placement.experts[network.rank], device=device))
        self.hold_as(bank, placement)

    def hold_as(self, own: ExpertBank, placement: Placement) -> None:
        """From now on this rank's experts are those of `own`, and `placement` says where all are."""
        self.placement = placement
        place = torch.zeros(len(placement.rank), dtype=torch.int64)
        for held in placement.experts:
            place[list(held)] = torch.arange(len(held))
        self._numbers = torch.tensor(placement.rank), place, torch.tensor([len(held) for held in placement.experts])
        self.hold(own)

    def whereabouts(self, expert: Int[Tensor, "n"]) -> tuple[Tensor, Tensor, Tensor]:
        self._numbers = tuple(numbers.to(expert.device) for numbers in self._numbers)
        number, place, count = self._numbers
        rank = number[expert]
        return rank, place[expert], count[rank]

    def runs(self) -> Iterator[tuple[int, int, int]]:
        held = self.placement.experts[self.network.rank]
        ends = [i for i, (a, b) in enumerate(pairwise(held), 1) if b != a + 1]
        for first, end in zip([0, *ends], [*ends, len(held)], strict=True):
            yield held[first], held[end - 1], first


@torch.compiler.disable
def _sent(bank: SentTokens, x: Tensor, routing: SparseRouting) -> Arrival:
    parcels = Parcels.of(routing, *bank.whereabouts(routing.expert), bank.network.size)
    tokens, rows = bank.network.exchanges(parcels.counts)
    arriving = tokens.begin(x[parcels.token]), rows.begin(parcels.code), rows.begin(parcels.weight)

    def finish() -> Tensor:
        z, code, weight = (arrival() for arrival in arriving)
        y = bank.own(z, arrived(code, weight, tokens, rows, bank.own.n_experts))
        return parcels.opened(tokens.back(y)())

    waiting: Any = torch.compiler.disable(finish)
    return waiting


@dataclass(frozen=True)
class Parcels:
    """What leaves a rank, in the order of the ranks it goes to: `token[p]` is the token of parcel p, each once for a
    rank; of each row `code` = parcel's number on its way * experts there + expert's number there, and its `weight`.
    `counts` [ranks, 2] are parcels and rows to every rank."""

    token: Int[Tensor, "p"]
    code: Int[Tensor, "n"]
    weight: Float[Tensor, "n"]
    counts: Int[Tensor, "r 2"]
    n_tokens: int

    @classmethod
    def of(cls, routing: SparseRouting, rank: Tensor, place: Tensor, n_there: Tensor, n_ranks: int) -> "Parcels":
        """The parcels of rows whose experts are number `place` of `n_there` on rank `rank`."""
        key, parcel = (rank * routing.n_tokens + routing.token).unique(return_inverse=True)
        to = key // max(1, routing.n_tokens)
        ranks = torch.arange(n_ranks + 1, device=rank.device)
        first = torch.searchsorted(to, ranks)
        sorted_rank, order = rank.sort(stable=True)
        counts = torch.stack([first.diff(), torch.searchsorted(sorted_rank, ranks).diff()], dim=1)
        code = (parcel - first[rank]) * n_there + place
        token = key % max(1, routing.n_tokens)
        return cls(token, code[order], routing.weight[order], counts, routing.n_tokens)

    def opened(self, y: Float[Tensor, "p o"]) -> Float[Tensor, "t o"]:
        """The sum of every token's answers."""
        return y.new_zeros(self.n_tokens, y.shape[1]).index_add(0, self.token, y)


def arrived(code: Tensor, weight: Tensor, tokens: Exchange, rows: Exchange, n_experts: int) -> SparseRouting:
    """What came from all ranks, as a routing of the `n_experts` that are here."""
    before = torch.tensor([0, *tokens.received], device=code.device).cumsum(0)
    per_rank = torch.tensor(rows.received, device=code.device)
    source = before[:-1].repeat_interleave(per_rank, output_size=len(code))
    token, expert = source + code // n_experts, code % n_experts
    return SparseRouting(token, expert, weight, sum(tokens.received), n_experts)


def rows_of(bank: ExpertBank, name: str, expert: int) -> slice:
    """The rows of a bank's parameter that are one expert's."""
    wanted = bank.get_parameter(name)
    return next(rows for parameter, rows in bank.weights_of(expert) if parameter is wanted)


def require_spreadable(bank: ExpertBank) -> None:
    """Raises: ValueError where experts of a bank have weights in common, or no weights, or others'."""
    name = type(bank).__name__
    if bank.owner()[0] is not bank:
        raise ValueError(f"{name}: these experts belong to another layer, whose bank is the one to spread over ranks")
    if not any(True for _ in bank.parameters()):
        raise ValueError(f"{name} has no weights to spread over ranks")
    if bank.shared_parameters():
        raise ValueError(f"{name}: experts that share weights cannot be spread over ranks")
    try:
        covered = {id(parameter) for parameter, _ in bank.weights_of(0)}
    except NotImplementedError:
        raise ValueError(f"{name} does not say which weights are whose: it cannot be spread over ranks") from None
    if alone := [other for other, parameter in bank.named_parameters() if id(parameter) not in covered]:
        raise ValueError(f"{name}: {alone[0]} is no expert's own, so its experts cannot be spread over ranks")

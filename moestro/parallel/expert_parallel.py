"""`ExpertParallel`: a bank of which every rank of a group holds some experts."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moestro.cost import Cost
from moestro.experts import ExpertBank
from moestro.ops.precision import compute_dtype
from moestro.parallel.exchange import Arrival, Exchange, Network
from moestro.parallel.layout import Layout, lay_out, row_pieces
from moestro.parallel.placement import Placement
from moestro.routing import Routing, SparseRouting


class ExpertParallel(ExpertBank):
    """The experts of `bank`, each on the rank that `placement` says: this rank keeps its own, the others go.

    Every rank calls it with its own tokens and their routing, and gets their outputs. A token is sent once to every
    rank that has some of its experts, with their numbers and gates; there the bank of that rank's experts computes as
    it would in a layer, and one sum comes back. Of n ranks, a token that meets experts on m others moves 2 m d numbers
    forward and 2 m d backward, however many experts it meets there, besides 8 bytes and a gate for each row. Rows are
    never dropped; ranks may have no tokens, experts no rows.

    Gradients are those of the sum of all ranks' losses, whole: no rank has to add anything to those of its experts.
    Parameters keep the names that they have in one process, and `layout` says where each lies in the whole one.

    Experts whose weights belong to several of them, or to several layers, cannot be spread.

    Raises: ValueError where the bank cannot be spread, or the placement is of other experts or ranks.
    """

    def __init__(self, bank: ExpertBank, placement: Placement, network: Network, copies: Any = None) -> None:
        super().__init__()
        require_spreadable(bank)
        if len(placement.rank) != bank.n_experts or placement.n_ranks != network.size:
            raise ValueError(
                f"a placement of {len(placement.rank)} experts on {placement.n_ranks} ranks, "
                f"here are {bank.n_experts} on {network.size}"
            )
        # in tuples, so that neither is registered as a part: `_hold` gives this bank the parts of its rank's experts
        self._whole, self.network, self.copies = (on_meta(bank),), network, copies
        device = next(bank.parameters()).device
        bank.reindex(torch.tensor(placement.experts[network.rank], device=device))
        self.hold(bank, placement)

    def hold(self, own: ExpertBank, placement: Placement) -> None:
        """From now on this rank's experts are those of `own`, as `placement` says of all ranks."""
        self._own, self.placement = (own,), placement
        self._parameters, self._modules, self._buffers = own._parameters, own._modules, own._buffers
        self._non_persistent_buffers_set = own._non_persistent_buffers_set
        number = torch.tensor(placement.rank)
        place = torch.empty_like(number)
        for held in placement.experts:
            place[list(held)] = torch.arange(len(held))
        self._numbers = number, place, torch.tensor([len(held) for held in placement.experts])
        for name, parameter in own.named_parameters():
            lay_out(parameter, self.layout(name))

    @property
    def whole(self) -> ExpertBank:
        """The bank in one process, its weights on the device meta: names, shapes and sizes of all experts."""
        return self._whole[0]

    @property
    def own(self) -> ExpertBank:
        """The bank of this rank's experts, in the order of their numbers."""
        return self._own[0]

    @property
    def n_experts(self) -> int:  # type: ignore[override]
        return self.whole.n_experts

    def train(self, mode: bool = True) -> "ExpertParallel":
        self.own.train(mode)
        return super().train(mode)

    def run(self, z: Float[Tensor, "n d"], offsets: Int[Tensor, "e1"]) -> Float[Tensor, "n o"]:
        row = torch.arange(len(z), device=z.device)
        expert = torch.arange(self.n_experts, device=z.device).repeat_interleave(offsets.diff(), output_size=len(z))
        return self.begin(z, SparseRouting(row, expert, z.new_ones(len(z)), len(z), self.n_experts))()

    def forward(self, x: Float[Tensor, "t d"], routing: Routing) -> Float[Tensor, "t o"]:
        return self.begin(x, routing)()

    def begin(self, x: Float[Tensor, "t d"], routing: Routing) -> Arrival:
        """Send tokens to their experts; the call that is returned waits for them, computes this rank's experts and
        returns what all ranks' made of this rank's tokens."""
        if not isinstance(routing, SparseRouting):
            return partial(super().forward, x, routing)
        return _begun(self, x.to(compute_dtype(x)), routing)  # type: ignore[call-arg]

    def received(self, code: Tensor, weight: Tensor, tokens: Exchange, rows: Exchange) -> SparseRouting:
        """What arrived, as the routing of this rank's experts."""
        n_own, device = self.own.n_experts, code.device
        before = torch.tensor([0, *tokens.received], device=device).cumsum(0)
        source = before[:-1].repeat_interleave(torch.tensor(rows.received, device=device), output_size=len(code))
        return SparseRouting(source + code // n_own, code % n_own, weight, sum(tokens.received), n_own)

    def whereabouts(self, expert: Int[Tensor, "n"]) -> tuple[Tensor, Tensor, Tensor]:
        """Of every expert in `expert` the rank, its number there and how many experts that rank has."""
        self._numbers = tuple(numbers.to(expert.device) for numbers in self._numbers)
        number, place, count = self._numbers
        rank = number[expert]
        return rank, place[expert], count[rank]

    def layout(self, name: str) -> Layout:
        """Where this rank's part of the parameter `name` lies in the whole one."""
        return row_pieces(list(self.places(name)), self.whole.get_parameter(name).shape, self.copies)

    def places(self, name: str) -> Iterator[tuple[slice, slice]]:
        """Rows of the whole parameter `name`, and of this rank's: one pair for experts that follow one another."""
        held = self.placement.experts[self.network.rank]
        ends = [i for i, (a, b) in enumerate(pairwise(held), 1) if b != a + 1]
        for first, last in zip([0, *ends], [*ends, len(held)], strict=True):
            there = rows_of(self.whole, name, held[first]).start, rows_of(self.whole, name, held[last - 1]).stop
            here = rows_of(self.own, name, first).start, rows_of(self.own, name, last - 1).stop
            yield slice(*there), slice(*here)

    def weights_of(self, expert: int) -> tuple[tuple[nn.Parameter, slice], ...]:
        """This rank's parameters, and the rows of the whole ones that are the expert's."""
        named = {id(parameter): name for name, parameter in self.whole.named_parameters()}
        return tuple((self.get_parameter(named[id(p)]), rows) for p, rows in self.whole.weights_of(expert))

    def row_parameters(self) -> tuple[nn.Parameter, ...]:
        return self.own.row_parameters()

    def reindex(self, index: Int[Tensor, "m"]) -> None:
        """Raises: ValueError, for experts are renumbered before they are spread over ranks."""
        raise ValueError("experts that are spread over ranks cannot be reindexed")

    def own_parameters(self) -> Float[Tensor, "e"] | float:
        return self._here(self.whole.own_parameters())

    def row_flops(self) -> Float[Tensor, "e"] | float:
        return self._here(self.whole.row_flops())

    def row_widths(self) -> Float[Tensor, "e"] | float:
        return self._here(self.whole.row_widths())

    def flops(self, routing: Routing) -> Cost:
        each = self.row_flops()
        if isinstance(each, Tensor) and isinstance(routing, SparseRouting):
            return Cost.exact(each[routing.expert].sum())
        return super().flops(routing)

    def _here(self, value: Tensor | float) -> Tensor | float:
        return value.to(next(self.parameters()).device) if isinstance(value, Tensor) else value


@torch.compiler.disable
def _begun(bank: ExpertParallel, x: Tensor, routing: SparseRouting) -> Arrival:
    parcels = Parcels.of(routing, *bank.whereabouts(routing.expert), bank.network.size)
    tokens, rows = bank.network.exchanges(parcels.counts)
    arriving = tokens.begin(x[parcels.token]), rows.begin(parcels.code), rows.begin(parcels.weight)

    def finish() -> Tensor:
        z, code, weight = (arrival() for arrival in arriving)
        y = bank.own(z, bank.received(code, weight, tokens, rows))
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


def rows_of(bank: ExpertBank, name: str, expert: int) -> slice:
    """The rows of a bank's parameter that are one expert's."""
    wanted = bank.get_parameter(name)
    return next(rows for parameter, rows in bank.weights_of(expert) if parameter is wanted)


def on_meta(bank: ExpertBank) -> ExpertBank:
    """A copy without numbers: the weights are on the device meta, and none is copied on the way."""
    without: dict[int, Any] = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        for parameter in bank.parameters()
    }
    return copy.deepcopy(bank, without)


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

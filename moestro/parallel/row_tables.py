"""Tables of a million experts over several ranks: some rows of them on each, or some columns."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from moestro.experts import TableBank
from moestro.ops.met_rows import Columns
from moestro.ops.precision import compute_dtype
from moestro.parallel.collectives import shown, sum_going_back, sum_going_forward
from moestro.parallel.exchange import Arrival, Exchange, Hop, Network
from moestro.parallel.expert_parallel import SentTokens
from moestro.parallel.layout import Layout, Piece
from moestro.parallel.spread_bank import SpreadBank
from moestro.routing import SparseRouting


class RowParallel(SentTokens):
    """Every rank holds consecutive experts of a table, as equally many as there can be: the rows of its tables, their
    gradients and their optimizer's state, none of which is ever sent.

    Partial sums come back, not rows. With h k rows a token in t tables, d numbers of b bytes a row, and r ranks, of
    which a token meets m <= min(r - 1, h k) others, sending tokens moves 2 m d b bytes a token forward and as many
    backward, and 8 + 2 b for each id and gate that leaves. Fetching rows would move (r - 1) / r * h k t d b forward and
    their gradients backward: h k t / (2 r) times as much where every rank is met.

    Raises: ValueError for more ranks than experts.
    """

    def __init__(self, bank: TableBank, network: Network, copies: Any = None) -> None:
        if bank.n_experts < network.size:
            raise ValueError(f"a table of {bank.n_experts} experts on {network.size} ranks, allowed: at least one each")
        super().__init__(bank, network, copies)
        self.bounds = [rank * bank.n_experts // network.size for rank in range(network.size + 1)]
        self._bounds = torch.tensor(self.bounds)
        bank.keep(*self._mine())
        self.hold(bank)

    def _mine(self) -> tuple[int, int]:
        return self.bounds[self.network.rank], self.bounds[self.network.rank + 1]

    def whereabouts(self, expert: Int[Tensor, "n"]) -> tuple[Tensor, Tensor, Tensor]:
        self._bounds = self._bounds.to(expert.device)
        rank = torch.searchsorted(self._bounds, expert, right=True) - 1
        return rank, expert - self._bounds[rank], self._bounds.diff()[rank]

    def runs(self) -> Iterator[tuple[int, int, int]]:
        first, end = self._mine()
        yield first, end - 1, 0


class ColumnParallel(SpreadBank):
    """Every rank of `group` holds d / r consecutive columns of all rows of the tables, for d numbers a row and r ranks.

    All ranks compute for all tokens: each gets its columns of every rank's tokens and all ids and gates, sums partial
    dot products over the ranks, and sends back its columns of the outputs. A token moves 2 (r - 1) / r d b bytes
    forward and the same backward, and for each of its h k rows 8 (r - 1) bytes of id, (r - 1) b of gate, and twice
    2 (r - 1) b for sums of dot products (thrice for gated experts). In float32, with every rank met, that is less than
    `RowParallel` moves where d > 7/4 r / (r - 1) h k. Memory for ids grows with the number of ranks.

    Raises: ValueError where d is no multiple of the number of ranks.
    """

    def __init__(self, bank: TableBank, group: Any = None) -> None:
        ranks, d_model = dist.get_world_size(group), next(bank.parameters()).shape[1]
        if d_model % ranks:
            raise ValueError(f"tables of d_model={d_model} columns on {ranks} ranks, allowed: ranks that divide them")
        super().__init__(bank)
        self.group, self.n_ranks, self.width = group, ranks, d_model // ranks
        first = dist.get_rank(group) * self.width
        self.first = first
        bank.keep_columns(first, first + self.width)
        self.hold(bank)

    def layout(self, name: str) -> Layout:
        rows, d_model = self.whole.get_parameter(name).shape
        return Layout((rows, d_model), (Piece((0, self.first), (0, 0), (rows, self.width)),))

    def sent(self, x: Float[Tensor, "t d"], routing: SparseRouting) -> Arrival:
        return _columns_sent(self, x.to(compute_dtype(x)), routing)  # type: ignore[call-arg]

    def everyones(self, routing: SparseRouting, tokens: list[int], rows: list[int]) -> SparseRouting:
        """The routings of all ranks as one; their tokens stand rank after rank."""
        before = sum(tokens[: dist.get_rank(self.group)])
        code = (routing.token + before) * self.n_experts + routing.expert
        code, weight = shown(code, rows, self.group), shown(routing.weight, rows, self.group)
        return SparseRouting(code // self.n_experts, code % self.n_experts, weight, sum(tokens), self.n_experts)


@torch.compiler.disable
def _columns_sent(bank: ColumnParallel, x: Tensor, routing: SparseRouting) -> Arrival:
    n, group, own = bank.n_ranks, bank.group, bank.own
    counts = shown(torch.tensor([[len(x), routing.n_rows]], device=x.device), [1] * n, group).T.tolist()
    tokens, rows = counts
    exchange = Exchange((Hop(group, [len(x)] * n, tokens),), tokens)
    arriving = exchange.begin(x.unflatten(1, (n, -1)).transpose(0, 1).flatten(0, 1))
    together = bank.everyones(routing, tokens, rows)
    columns = Columns(partial(sum_going_forward, group=group), partial(sum_going_back, group=group))

    def finish() -> Tensor:
        y = own.of_rows(arriving(), together, columns)  # type: ignore[operator]
        return exchange.back(y)().unflatten(0, (n, -1)).transpose(0, 1).flatten(1)

    waiting: Any = torch.compiler.disable(finish)
    return waiting

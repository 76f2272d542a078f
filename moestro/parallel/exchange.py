"""Rows sent to other ranks and back: uneven all-to-alls that gradients flow through and other work can hide."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

# What waits for rows that are on their way, and returns them.
Arrival = Callable[[], Tensor]


class _Flight:
    """One all-to-all under way."""

    def start(self, rows: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
        """Begin to send; returns where rows will arrive."""
        # both are kept alive until they have been sent and received
        self.rows, self.out = rows.contiguous(), rows.new_empty(sum(received), *rows.shape[1:])
        self.work: Any = dist.all_to_all_single(self.out, self.rows, received, sent, group=group, async_op=True)
        return self.out

    def landed(self) -> Tensor:
        """The rows, once they are there."""
        self.work.wait()
        out = self.out
        del self.rows, self.out, self.work
        return out


class _Begin(torch.autograd.Function):
    """Starts an exchange; its backward waits for the one of gradients that that of `_End` started."""

    @staticmethod
    def forward(ctx, rows, hop, flight, backward):  # type: ignore[override]
        ctx.backward_flight = backward
        return flight.start(rows, hop.sent, hop.received, hop.group)

    @staticmethod
    @once_differentiable
    def backward(ctx, unused):  # type: ignore[override]
        return ctx.backward_flight.landed(), None, None, None


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pending, hop, flight, backward):  # type: ignore[override]
        ctx.hop, ctx.backward_flight = hop, backward
        return flight.landed().view_as(pending)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):  # type: ignore[override]
        ctx.backward_flight.start(gradient, ctx.hop.received, ctx.hop.sent, ctx.hop.group)
        # what is on its way stands in `_Begin`; this is only of the shape that autograd expects here
        return gradient, None, None, None


@dataclass(frozen=True)
class Hop:
    """One all-to-all of `group`: `sent[r]` rows to its rank r, `received[r]` from it, rank after rank; received rows
    are then put into `order` where there is one."""

    group: Any
    sent: list[int]
    received: list[int]
    order: Tensor | None = None

    def begin(self, rows: Tensor) -> Arrival:
        """Start sending; while rows are on their way, forward and backward, other work can be done."""
        flight, backward = _Flight(), _Flight()
        pending = _Begin.apply(rows, self, flight, backward)

        def arrived() -> Tensor:
            out: Any = _End.apply(pending, self, flight, backward)
            return out if self.order is None else out[self.order]

        return arrived

    def back(self, rows: Tensor) -> Arrival:
        """Start sending answers, one for each received row, to where the rows came from."""
        if self.order is not None:
            rows = rows[self.order.argsort()]
        return Hop(self.group, self.received, self.sent).begin(rows)


@dataclass(frozen=True)
class Exchange:
    """Rows that change ranks in one hop or more. `received[r]` is how many come from rank r in the end."""

    hops: tuple[Hop, ...]
    received: list[int]

    def begin(self, rows: Tensor) -> Arrival:
        """Start sending rows, which lie in the order of the ranks they go to; they arrive in that of those they came
        from."""
        arrival = self.hops[0].begin(rows)
        return lambda: self._on(arrival(), self.hops[1:])

    def back(self, rows: Tensor) -> Arrival:
        """Start sending one answer for every row that arrived; they come in the order in which rows were sent."""
        arrival = self.hops[-1].back(rows)
        return lambda: self._home(arrival(), self.hops[:-1])

    def _on(self, rows: Tensor, hops: tuple[Hop, ...]) -> Tensor:
        for hop in hops:
            rows = hop.begin(rows)()
        return rows

    def _home(self, rows: Tensor, hops: tuple[Hop, ...]) -> Tensor:
        for hop in reversed(hops):
            rows = hop.back(rows)()
        return rows


class Network:
    """Ranks that exchange rows directly, each with each."""

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def exchanges(self, counts: Tensor) -> list[Exchange]:
        """For each column of `counts` [ranks, kinds], the exchange in which this rank sends that many rows to every
        rank. Every rank must call it; the host waits for the device."""
        received = torch.empty_like(counts)
        dist.all_to_all_single(received, counts.contiguous(), group=self.group)
        there, here = counts.T.tolist(), received.T.tolist()
        return [Exchange((Hop(self.group, s, r),), r) for s, r in zip(there, here, strict=True)]


class TwoLevelNetwork(Network):
    """Hosts of several ranks: rows first cross to the other host, to the rank with this one's number there, then go to
    their rank within it. Between hosts a rank so sends few large messages, one for each host, instead of one for each
    rank; within hosts every row is sent once more.

    Rank number `host * len(inside) + place`; `hosts` are the ranks of one place, `inside` those of one host.
    """

    def __init__(self, hosts: Any, inside: Any) -> None:
        self.hosts, self.inside = hosts, inside
        self.n_hosts, self.n_inside = dist.get_world_size(hosts), dist.get_world_size(inside)
        self.size = self.n_hosts * self.n_inside
        self.rank = dist.get_rank(hosts) * self.n_inside + dist.get_rank(inside)

    def exchanges(self, counts: Tensor) -> list[Exchange]:
        by_host = counts.view(self.n_hosts, self.n_inside, -1)
        crossed = torch.empty_like(by_host)
        dist.all_to_all_single(crossed, by_host.contiguous(), group=self.hosts)
        by_place = crossed.transpose(0, 1).contiguous()
        landed = torch.empty_like(by_place)
        dist.all_to_all_single(landed, by_place, group=self.inside)
        kinds = zip(by_host.unbind(-1), crossed.unbind(-1), landed.unbind(-1), strict=True)
        return [self._exchange(*sizes) for sizes in kinds]

    def _exchange(self, by_host: Tensor, crossed: Tensor, landed: Tensor) -> Exchange:
        """Rows that leave `by_host` [host, place], rows `crossed` [from host, to place] and `landed` [from place, from
        host]."""
        first = Hop(self.hosts, by_host.sum(1).tolist(), crossed.sum(1).tolist(), across(crossed))
        second = Hop(self.inside, crossed.sum(0).tolist(), landed.sum(1).tolist(), across(landed))
        return Exchange((first, second), landed.T.flatten().tolist())


def across(sizes: Tensor) -> Tensor:
    """The order that puts rows in blocks of `sizes` [a, b], those of each a together, into those of each b together."""
    column = torch.arange(sizes.shape[1], device=sizes.device).repeat(sizes.shape[0])
    return column.repeat_interleave(sizes.flatten()).argsort(stable=True)

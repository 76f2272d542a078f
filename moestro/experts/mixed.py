"""`MixedBank`: banks of different kinds as one."""

from collections.abc import Callable, Iterator, Sequence
from functools import reduce

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moestro.experts.base import ExpertBank, real_device
from moestro.routing import Routing, SparseRouting


class MixedBank(ExpertBank):
    """The experts of several banks under one routing: those of the first bank are experts 0, 1, ..., those of the
    second follow, and so on. A token can meet experts of every kind.

    On a GPU the host waits for the device once, to learn where each bank's rows begin.

    Experts stay in their bank when they are moved: a fresh one (-1) is of the kind its position had, or of the last
    bank's beyond the end. A bank that loses its last expert goes.
    """

    def __init__(self, banks: Sequence[ExpertBank]) -> None:
        super().__init__()
        if not banks:
            raise ValueError("banks=[], allowed: at least one bank of experts")
        self.banks = nn.ModuleList(banks)

    @property
    def n_experts(self) -> int:  # type: ignore[override]
        return sum(bank.n_experts for bank in self._banks())

    def _banks(self) -> list[ExpertBank]:
        return list(self.banks)  # type: ignore[arg-type]

    def ranges(self) -> Iterator[tuple[ExpertBank, int, int]]:
        """Every bank with its first expert and the one after its last."""
        first = 0
        for bank in self._banks():
            yield bank, first, first + bank.n_experts
            first += bank.n_experts

    def run(self, z: Float[Tensor, "n d"], offsets: Int[Tensor, "e1"]) -> Float[Tensor, "n d"]:
        parts = []
        for bank, first, end in self.ranges():
            bounds = offsets[first : end + 1]
            parts.append(bank.run(z[int(bounds[0]) : int(bounds[-1])], bounds - bounds[0]))
        return torch.cat(parts)

    def forward(self, x: Float[Tensor, "t d"], routing: Routing) -> Float[Tensor, "t d"]:
        return self.begin(x, routing)() if isinstance(routing, SparseRouting) else super().forward(x, routing)

    def begin(self, x: Float[Tensor, "t d"], routing: Routing) -> Callable[[], Float[Tensor, "t d"]]:
        """All banks begin before one finishes, and the last finish first: in most mixtures those that send nothing."""
        if not isinstance(routing, SparseRouting):
            return super().begin(x, routing)
        routing = routing.grouped()
        rows = routing.offsets.tolist()
        begun = [
            bank.begin(x, _part(routing, first, end, slice(rows[first], rows[end])))
            for bank, first, end in self.ranges()
        ]
        return lambda: reduce(torch.add, [finish() for finish in reversed(begun)][::-1])

    def weights_of(self, expert: int) -> tuple[tuple[nn.Parameter, slice], ...]:
        return next(bank.weights_of(expert - first) for bank, first, end in self.ranges() if expert < end)

    def reindex(self, index: Int[Tensor, "m"]) -> None:
        """Raises: ValueError where experts would change banks, or stand in another order than their banks."""
        ranges = list(self.ranges())
        kind = [number for number, (_, first, end) in enumerate(ranges) for _ in range(first, end)]
        want = [kind[e] if e >= 0 else kind[min(j, len(kind) - 1)] for j, e in enumerate(index.tolist())]
        if want != sorted(want):
            at = next(j for j in range(1, len(want)) if want[j] < want[j - 1])
            raise ValueError(
                f"index={index.tolist()}: position {at} belongs to bank {want[at]} and stands behind one of bank "
                f"{want[at - 1]}; experts of a mixed bank stay in their banks, in order"
            )
        for number, (bank, first, _) in enumerate(ranges):
            own = index[torch.tensor(want, device=index.device) == number]
            if len(own):
                bank.reindex(torch.where(own >= 0, own - first, own))
        self.banks = nn.ModuleList([bank for number, (bank, _, _) in enumerate(ranges) if number in want])

    def row_parameters(self) -> tuple[Tensor, ...]:
        return tuple(parameter for bank in self._banks() for parameter in bank.row_parameters())

    def row_flops(self) -> Float[Tensor, "e"]:
        return self._joined([bank.row_flops() for bank in self._banks()])

    def own_parameters(self) -> Float[Tensor, "e"]:
        return self._joined([bank.own_parameters() for bank in self._banks()])

    def shared_parameters(self) -> float:
        return sum(bank.shared_parameters() for bank in self._banks())

    def row_widths(self) -> Float[Tensor, "e"]:
        return self._joined([bank.row_widths() for bank in self._banks()])

    def _joined(self, values: Sequence[Tensor | float]) -> Float[Tensor, "e"]:
        """One number an expert, where a bank may have given one for all of its own."""
        device = real_device(next((parameter.device for parameter in self.parameters()), torch.device("cpu")))
        each = [
            value if isinstance(value, Tensor) else torch.full((bank.n_experts,), value, dtype=torch.float64)
            for value, bank in zip(values, self._banks(), strict=True)
        ]
        return torch.cat([value.to(device) for value in each])


def _part(routing: SparseRouting, first: int, end: int, rows: slice) -> SparseRouting:
    """What a grouped routing sends to experts first, ..., end - 1, numbered from 0: its rows `rows`."""
    bounds = routing.offsets[first : end + 1]
    return SparseRouting(
        routing.token[rows],
        routing.expert[rows] - first,
        routing.weight[rows],
        routing.n_tokens,
        end - first,
        bounds=bounds - bounds[0],
    )

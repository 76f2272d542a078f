"""A table's gradient as the rows that have one: their values, or the factors of which values are made when used."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from moestro.ops import backend
from moestro.ops.native.row_gradients import segment_norm, segment_values

# Numbers of a table that are worked on at a time: few enough to stay in a core's cache; elsewhere enough that kernels
# are few.
CHUNK = 2**17
DEVICE_CHUNK = 2**26
_PENDING = "pending_row_factors"


class RowValues:
    """A gradient that is 0 outside rows `ids` (ascending, each once), whose values [n, d] exist."""

    def __init__(self, ids: Int[Tensor, "n"], values: Float[Tensor, "n d"]) -> None:
        self.ids, self.all = ids, values

    def values(self, start: int, stop: int) -> Float[Tensor, "m d"]:
        """Those of the rows `ids[start:stop]`."""
        return self.all[start:stop]

    def tensors(self) -> tuple[Tensor, ...]:
        """The floating-point numbers that it is made of."""
        return (self.all,)

    def native(self) -> tuple[Tensor, ...]:
        """What the native kernel of AdamW reads."""
        return (self.all.float().contiguous(),)

    def norm(self) -> Float[Tensor, ""]:
        """2-norm of all values, in float32 at least."""
        return torch.linalg.vector_norm(self.all, dtype=torch.promote_types(self.all.dtype, torch.float32))

    def scale_(self, factor: Float[Tensor, ""]) -> None:
        """Multiply all values."""
        self.all.mul_(factor.to(self.all.device))


class FactoredRows:
    """A gradient that is never written down: row `ids[i]` is the sum of coefficient_p * source[token_p] over the places
    p = order[j] with j from `starts[i]` to `starts[i + 1]`; `token` is in that order, `coefficient` is not. For k rows
    a token it keeps t * (d + 3 k) numbers, where values are up to t * k * d. Methods as of `RowValues`."""

    def __init__(
        self,
        ids: Int[Tensor, "n"],
        starts: Int[Tensor, "n1"],
        order: Int[Tensor, "p"],
        source: Float[Tensor, "t d"],
        token: Int[Tensor, "p"],
        coefficient: Float[Tensor, "p"],
    ) -> None:
        # detached: these are numbers of a graph that backward has been through
        self.ids, self.starts, self.order, self.source = ids, starts, order, source.detach().contiguous()
        self.token, self.coefficient = token, coefficient.detach()

    def values(self, start: int, stop: int) -> Float[Tensor, "m d"]:
        if backend.runs_native(self.source, self.coefficient):
            factors = self.source, self.token, self.coefficient
            return segment_values(self.order, self.starts[start : stop + 1], *factors)
        whole = start == 0 and stop == len(self.ids)
        # else the host waits for the device
        first, last = (0, len(self.order)) if whole else self.starts[[start, stop]].tolist()
        weight, starts = self.coefficient[self.order[first:last]], self.starts[start:stop] - first
        return F.embedding_bag(self.token[first:last], self.source, starts, per_sample_weights=weight, mode="sum")

    def tensors(self) -> tuple[Tensor, ...]:
        return self.source, self.coefficient

    def native(self) -> tuple[Tensor, ...]:
        places = self.order.contiguous(), self.starts, self.token.contiguous()
        return *places, self.source.float(), self.coefficient.float().contiguous()

    def norm(self) -> Float[Tensor, ""]:
        if backend.runs_native(self.source, self.coefficient):
            return segment_norm(self.order, self.starts, self.source, self.token, self.coefficient)
        pieces = spans(len(self.ids), self.source.shape[1], self.source.device)
        norms = [torch.linalg.vector_norm(self.values(*span)) for span in pieces]
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else self.source.new_zeros(())

    def scale_(self, factor: Float[Tensor, ""]) -> None:
        # not in place: coefficients may be the gates themselves (`value_rows`)
        self.coefficient = self.coefficient * factor.to(self.coefficient)


RowGradient = RowValues | FactoredRows


def spans(n_rows: int, width: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Starts and ends of pieces of rows of `width` numbers that stay in cache."""
    size = max(1, (CHUNK if device.type == "cpu" else DEVICE_CHUNK) // max(1, width))
    for start in range(0, n_rows, size):
        yield start, min(start + size, n_rows)


def collect_factors(tables: Iterable[Tensor]) -> None:
    """From now on a backward pass leaves the factors of these tables' gradients beside them, and no `.grad`."""
    for table in tables:
        setattr(table, _PENDING, [])


def pending_factors(table: Tensor) -> list[FactoredRows] | None:
    """Where a backward pass leaves the factors of this table's gradient; None where it is to make a `.grad`."""
    return getattr(table, _PENDING, None)


def forget_factors(table: Tensor) -> None:
    """What `zero_grad` is for a `.grad`."""
    (pending_factors(table) or []).clear()


def row_gradient(table: Tensor) -> RowGradient | None:
    """A table's gradient, summed over the backward passes since it was last forgotten; None where there is none.

    Raises: ValueError where it is dense, or partly factors and partly `.grad`.
    """
    factors = pending_factors(table)
    if not factors:
        return None if table.grad is None else RowValues(*coalesced_rows(table))
    if table.grad is not None:
        raise ValueError("a table has a gradient in factors and one in .grad: it was used by an operation of each kind")
    if len(factors) > 1:
        factors[:] = [merged(factors)]
    return factors[0]


class TableGradients:
    """The gradients that a backward pass returns for tables, named by their places among an autograd function's
    arguments. Made in the forward pass: hooks on saved tensors, and recomputation, hand the backward pass other tensors
    than the tables, and nothing lies beside those."""

    def __init__(self, tables: Mapping[int, Tensor]) -> None:
        self._pending = {place: pending_factors(table) for place, table in tables.items()}
        self._dtypes = {place: table.dtype for place, table in tables.items()}

    def of(
        self,
        needed: Sequence[bool],
        make_segments: Callable[[], Any],
        token_of: Callable[[Tensor], Tensor],
        factors: Mapping[int, tuple[Tensor, Tensor]],
    ) -> list[Tensor | None]:
        """For each {place: (source, coefficient)} the rows that are the sum over their places p of coefficient_p *
        source[token_of(p)], in the table's dtype; None where the table needs none, and where its factors are collected,
        which are then left beside it. Ids are sorted (`make_segments`) only where a table needs a gradient."""
        if not any(needed[place] for place in factors):
            return [None] * len(factors)
        segments = make_segments()
        token = token_of(segments.order)
        return [
            self._one(place, segments, source, token, coefficient.flatten()) if needed[place] else None
            for place, (source, coefficient) in factors.items()
        ]

    def _one(self, place: int, segments: Any, source: Tensor, token: Tensor, coefficient: Tensor) -> Tensor | None:
        pending = self._pending[place]
        if pending is None or segments.rows is None:
            return segments.table_gradient(source, token, coefficient).to(self._dtypes[place])
        pending.append(factored(segments, source, token, coefficient))
        return None


def factored(segments: Any, source: Tensor, token: Tensor, coefficient: Tensor) -> FactoredRows:
    """A gradient in factors, from the places of its rows (`Segments` with `sparse`)."""
    starts = F.pad(segments.starts[: len(segments.rows)], (0, 1), value=len(segments.order))
    return FactoredRows(segments.rows, starts, segments.order, source, token, coefficient)


def merged(parts: Sequence[FactoredRows]) -> FactoredRows:
    """The sum of gradients in factors: all tokens after each other."""
    counts = [(part.ids, part.starts.diff(), len(part.order)) for part in parts]
    each = torch.cat([ids.repeat_interleave(count, output_size=n) for ids, count, n in counts])
    found, order = each.sort(stable=True)
    ids, count = found.unique_consecutive(return_counts=True)
    offsets = accumulate((len(part.source) for part in parts), initial=0)
    token = torch.cat([part.token + offset for part, offset in zip(parts, offsets, strict=False)])
    coefficient = torch.cat([part.coefficient[part.order] for part in parts])
    source = torch.cat([part.source for part in parts])
    return FactoredRows(ids, F.pad(count.cumsum(0), (1, 0)), order, source, token[order], coefficient)


def coalesced_rows(table: Tensor) -> tuple[Int[Tensor, "n"], Float[Tensor, "n d"]]:
    """Ids, ascending and each once, and values of a table's row gradient, after which `.grad` is coalesced too.

    torch forgets, when it accumulates gradients, that they were coalesced; where the ids still ascend, that is
    restored without a copy.

    Raises: ValueError where the gradient is not sparse over rows.
    """
    grad = table.grad
    if grad is None or grad.layout != torch.sparse_coo or (grad.sparse_dim(), grad.dense_dim()) != (1, 1):
        kind = "none" if grad is None else str(grad.layout)
        raise ValueError(f"rows need gradients that are sparse over rows (torch.sparse_coo), got {kind}")
    if not grad.is_coalesced():
        ids, values = grad._indices(), grad._values()
        if bool((ids[0, 1:] > ids[0, :-1]).all()):
            grad = torch.sparse_coo_tensor(ids, values, grad.shape, is_coalesced=True, check_invariants=False)
        else:
            grad = grad.coalesce()
        table.grad = grad
    return grad._indices()[0], grad._values()

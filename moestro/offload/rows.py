"""Rows of tables (PEER, memories) that wait in files or host memory: a cache of those that tokens met last."""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moestro.experts.tables import TableBank
from moestro.offload.counts import Counts
from moestro.offload.files import Files, OffloadError
from moestro.routing import Routing, SparseRouting

# Of each row of a bank: which slot it has; of each slot: which row, and when it was used last.
MAP, SLOT = 4, 16
# Numbers that elementwise operations take at a time, at most; what is left over they round otherwise.
VECTOR = 64


@dataclass(frozen=True)
class Table:
    """Where the rows [n, width] of a table lie: in `file` from byte `start`, in the dtype `stored`; `dtype` is that of
    the model in memory."""

    file: Path
    start: int
    rows: int
    width: int
    stored: torch.dtype
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in a file."""
        return self.width * self.stored.itemsize

    @property
    def slot_bytes(self) -> int:
        """Bytes of a row in fast memory."""
        return self.width * self.dtype.itemsize


# the tables of a bank by name, all of as many rows as it has experts
Tables = Mapping[str, Table]


def row_size(tables: Tables) -> int:
    """Bytes that one more cached row of a bank costs."""
    return sum(table.slot_bytes for table in tables.values()) + SLOT


def fixed_size(tables: Tables) -> int:
    """Bytes of a bank's map, however few rows are cached."""
    return MAP * next(iter(tables.values())).rows


class FileRows:
    """Rows read from files."""

    size = 0

    def __init__(self, files: Files, table: Table) -> None:
        self.files, self.table = files, table
        files.open(table.file)

    def read(self, rows: Sequence[int]) -> Tensor:
        """Rows [n, width], which ascend; neighbours in one go."""
        out = torch.empty(len(rows), self.table.row_bytes, dtype=torch.uint8)
        self.files.read_rows(self.table.file, self.table.start, rows, out)
        return out.view(self.table.stored)


class HostRows:
    """All rows in host memory."""

    def __init__(self, files: Files, table: Table) -> None:
        self.held = FileRows(files, table).read(range(table.rows))

    @property
    def size(self) -> int:
        """Bytes held."""
        return self.held.nbytes

    def read(self, rows: Sequence[int]) -> Tensor:
        """As `FileRows.read`."""
        return self.held[torch.tensor(rows)]


class RowCache:
    """The rows of one bank's tables that were used last, at most `capacity` of them, in compact tables of their own;
    every row of the bank is its row of each table. Which row goes: the one not used for longest."""

    def __init__(self, tables: Tables, capacity: int, files: Files, device: torch.device, host: bool = False) -> None:
        self.capacity, self.counts = capacity, Counts()
        self.sources = {name: (HostRows if host else FileRows)(files, table) for name, table in tables.items()}
        self.held = {n: torch.empty(capacity, t.width, dtype=t.dtype, device=device) for n, t in tables.items()}
        self._moved = sum(table.row_bytes for table in tables.values())
        n_rows = next(iter(tables.values())).rows
        self._slot = torch.full((n_rows,), -1, dtype=torch.int32)
        self._row = torch.full((capacity,), -1, dtype=torch.int64)
        self._used = torch.full((capacity,), -1, dtype=torch.int64)
        self._clock = 0

    def slots(self, ids: Tensor) -> Tensor:
        """Where the rows `ids`, of any shape, lie in the cached tables; what is not there is brought.

        Raises: ValueError for more different rows than the cache holds; OffloadError as files do.
        """
        rows, back = ids.cpu().unique(return_inverse=True)
        if len(rows) > self.capacity:
            raise ValueError(f"{len(rows)} different rows at once, {self.capacity} are held")
        self._clock += 1
        where = self._slot[rows]
        missing = rows[where < 0]
        self._used[where[where >= 0].long()] = self._clock
        self._count(len(rows), len(missing))
        if len(missing):
            self._bring(missing)
        return self._slot[rows].long()[back].to(ids.device)

    def _bring(self, missing: Tensor) -> None:
        victims = self._used.topk(len(missing), largest=False).indices
        gone = self._row[victims]
        # a read that fails leaves no slot that claims to hold a row
        self._slot[gone[gone >= 0]] = -1
        self._row[victims] = self._used[victims] = -1
        for name, source in self.sources.items():
            held = self.held[name]
            held[victims.to(held.device)] = source.read(missing.tolist()).to(held.device, held.dtype)
        self._slot[missing] = victims.int()
        self._row[victims], self._used[victims] = missing, self._clock

    def _count(self, asked: int, missing: int) -> None:
        counts = self.counts
        counts.requests += asked
        counts.asked_high += asked
        counts.hits_high += asked - missing
        counts.misses_high += missing
        counts.demanded += missing * self._moved

    @property
    def size(self) -> int:
        """Bytes in fast memory."""
        kept = sum(table.nbytes for table in self.held.values())
        return kept + self._slot.nbytes + self._row.nbytes + self._used.nbytes


class RowTables:
    """The tables of a model's banks, each behind a `RowCache`; `memory` bytes for all, shared in proportion to the
    tables' sizes.

    Raises: OffloadError where they do not hold what a token needs of every bank (`most` rows).
    """

    def __init__(
        self, banks: Mapping[str, Tables], memory: int, most: int, device: torch.device, host: bool = False
    ) -> None:
        least = sum(least_size(tables, most) for tables in banks.values())
        if memory < least:
            raise OffloadError(f"{memory:,} bytes for rows of tables do not do: a token's rows need {least:,}")
        self.files, spare = Files(), memory - least
        whole = {name: row_size(tables) * _rows(tables) for name, tables in banks.items()}
        total = sum(whole.values())
        self.passes, self.caches = 0, dict[str, RowCache]()
        for name, tables in banks.items():
            more = int(spare * whole[name] / total) // row_size(tables)
            capacity = min(_rows(tables), min(most, _rows(tables)) + more)
            self.caches[name] = RowCache(tables, capacity, self.files, device, host)

    @contextmanager
    def running(self, decoder: nn.Module) -> Iterator[None]:
        """Inside, the banks compute with cached rows."""
        with ExitStack() as undo:
            first: nn.Module = decoder.blocks[0]  # type: ignore[index,assignment]
            undo.callback(first.register_forward_pre_hook(self._count_pass).remove)
            for name, cache in self.caches.items():
                bank: Any = decoder.get_submodule(name)
                bank.forward = _forward(bank, cache)
                undo.callback(delattr, bank, "forward")
            yield

    def _count_pass(self, *_: object) -> None:
        self.passes += 1

    @property
    def counts(self) -> Counts:
        """Of all banks; a request is one row that a pass met in a bank."""
        return sum((cache.counts for cache in self.caches.values()), Counts(passes=self.passes))

    @property
    def size(self) -> int:
        """Bytes in fast memory."""
        return sum(cache.size for cache in self.caches.values())

    @property
    def host_size(self) -> int:
        """Bytes in host memory."""
        return sum(source.size for cache in self.caches.values() for source in cache.sources.values())


def least_size(tables: Tables, most: int) -> int:
    """Bytes of the smallest cache of a bank of which a token meets `most` rows."""
    return fixed_size(tables) + min(most, _rows(tables)) * row_size(tables)


def total_size(banks: Mapping[str, Tables]) -> int:
    """Bytes of all tables in files."""
    return sum(table.row_bytes * table.rows for tables in banks.values() for table in tables.values())


def _rows(tables: Tables) -> int:
    return next(iter(tables.values())).rows


def _forward(bank: TableBank, cache: RowCache) -> Any:
    """The bank's own forward pass, its tables the cached rows and its ids their places: the same numbers in the same
    order, so the same bits."""
    alone: Any = copy.copy(bank)
    held = {name: nn.Parameter(table, requires_grad=False) for name, table in cache.held.items()}
    alone.__dict__ = {**bank.__dict__, "_parameters": held, "n_experts": cache.capacity}

    def part(x: Tensor, routing: SparseRouting) -> Tensor:
        found = replace(routing, expert=cache.slots(routing.expert), n_experts=cache.capacity, logits=None, bounds=None)
        return alone.forward(x, found)

    def forward(x: Tensor, routing: Routing) -> Tensor:
        if not isinstance(routing, SparseRouting):
            raise OffloadError(f"{type(routing).__name__}: every token uses every row, so none can be left away")
        if len(routing.expert.unique()) <= cache.capacity:
            return part(x, routing)
        if routing.fixed is None:
            return torch.cat([part(*some) for some in _uneven_pieces(x, routing, cache.capacity)])
        size = cache.capacity // routing.fixed
        # pieces of whole vectors, so that every number is computed in the place of a vector that it has in one piece
        vectors = VECTOR // math.gcd(VECTOR, routing.fixed)
        size = size // vectors * vectors or max(1, size)
        return torch.cat([part(*some) for some in _pieces(x, routing, size)])

    return forward


def _pieces(x: Tensor, routing: SparseRouting, size: int) -> Iterator[tuple[Tensor, SparseRouting]]:
    """So many tokens at a time."""
    ids, weights = routing.matrix()
    for at in range(0, len(x), size):
        piece = slice(at, at + size)
        yield x[piece], SparseRouting.from_topk(ids[piece], weights[piece], routing.n_experts)


def _uneven_pieces(x: Tensor, routing: SparseRouting, most: int) -> Iterator[tuple[Tensor, SparseRouting]]:
    """As many tokens at a time as ask for at most `most` rows together, where tokens ask for different numbers.

    Raises: OffloadError where one token alone asks for more.
    """
    asked, first = torch.bincount(routing.token, minlength=len(x)).tolist(), 0
    if max(asked) > most:
        raise OffloadError(f"a token meets {max(asked)} rows of a bank, and memory holds {most} of them: give more")
    while first < len(x):
        end, rows = first + 1, asked[first]
        while end < len(x) and rows + asked[end] <= most:
            rows += asked[end]
            end += 1
        kept = routing.keep((routing.token >= first) & (routing.token < end))
        yield x[first:end], replace(kept, token=kept.token - first, n_tokens=end - first)
        first = end

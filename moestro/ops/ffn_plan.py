"""Which rows meet which units of which expert, and which rows belong to each token: all that does not depend on values.

On the CPU, libraries compile a product of 16-bit numbers for every new shape, which takes longer than the product, and
keep only so many of them. The number of rows an expert serves is new in every step; there experts get room for
a few rows more, so that there are few shapes.
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Expert(NamedTuple):
    """One expert's number, and its units among those of all experts."""

    number: int
    unit: slice


class Job(NamedTuple):
    """One expert's work: its slots (rows with room), how many of them are rows, and its hidden numbers (of one gate) in
    a buffer for all experts."""

    expert: Expert
    slots: slice
    n_rows: int
    hidden: slice

    @property
    def n_slots(self) -> int:
        return self.slots.stop - self.slots.start

    @property
    def width(self) -> int:
        return self.expert.unit.stop - self.expert.unit.start


def room(n: int) -> int:
    """Slots for n rows: up to an eighth more, so that few different numbers occur."""
    step = 1 << max(0, n.bit_length() - 4)
    return -(-n // step) * step


class Plan:
    """The plan of rows `bounds[e]:bounds[e+1]` for every expert e of width `widths[e]`; row n is of token `token[n]`.

    With `roomy`, experts get `room` for rows; slots that are no row hold zeros.
    """

    def __init__(self, token: Tensor, n_tokens: int, bounds: Sequence[int], widths: Sequence[int], roomy: bool) -> None:
        counts = [stop - start for start, stop in zip(bounds, bounds[1:], strict=False)]
        slots = [0, *accumulate(room(n) if roomy else n for n in counts)]
        units = [0, *accumulate(widths)]
        hidden = [0, *accumulate((b - a) * w for a, b, w in zip(slots, slots[1:], widths, strict=False))]
        self.jobs: list[Job] = []
        # slots that no product writes or that no row fills, and experts that no row meets
        self.empty_slots: list[slice] = []
        self.idle: list[Expert] = []
        for e, (n, width) in enumerate(zip(counts, widths, strict=True)):
            here, expert = slice(slots[e], slots[e + 1]), Expert(e, slice(units[e], units[e + 1]))
            if n and width:
                self.jobs.append(Job(expert, here, n, slice(hidden[e], hidden[e + 1])))
            first_empty = here.start + (n if width else 0)
            if first_empty < here.stop:
                self.empty_slots.append(slice(first_empty, here.stop))
            if width and not n:
                self.idle.append(expert)
        self.n_hidden, self.n_tokens, self.token = hidden[-1], n_tokens, token
        self.n_slots = slots[-1]
        self.slot: Tensor | None = None
        if self.n_slots != len(token):
            shift = torch.tensor([s - b for s, b in zip(slots, bounds, strict=True)][:-1], device=token.device)
            rows = torch.tensor(counts, device=token.device)
            self.slot = torch.arange(len(token), device=token.device) + shift.repeat_interleave(rows)

    def spread(self, values: Tensor) -> Tensor:
        """Values of rows, by slot and one after the other in memory; zeros where there is no row."""
        if self.slot is None:
            return values.contiguous()
        return values.new_zeros(self.n_slots).index_copy_(0, self.slot, values)

    def collect(self, values: Tensor) -> Tensor:
        """Values of slots, by row."""
        return values if self.slot is None else values[self.slot]

    def gather(self, x: Tensor) -> Tensor:
        """The token's row for every slot, zeros for slots that are empty or that no product writes."""
        rows = x.index_select(0, self.spread(self.token))
        for slots in self.empty_slots:
            rows[slots] = 0
        return rows

    def combine(self, rows: Tensor, weight: Tensor | None = None) -> Tensor:
        """Sum of each token's rows (of slots), times their weights (by row) where given, always in the same order."""
        if not len(rows):
            return rows.new_zeros(self.n_tokens, rows.shape[1])
        order, slots, starts = self._by_token
        each = None if weight is None else weight[order]
        return F.embedding_bag(slots, rows, starts, per_sample_weights=each, mode="sum")

    @cached_property
    def _by_token(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows in the order of their tokens, their slots, and where each token's begin."""
        order = self.token.argsort(stable=True)
        count = torch.bincount(self.token, minlength=self.n_tokens)
        return order, order if self.slot is None else self.slot[order], count.cumsum(0) - count

"""Gated experts with SiLU on rows sorted by expert, in tiles (`expert_tiles.c`)."""

from collections.abc import Sequence
from heapq import heapreplace
from itertools import accumulate
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from moestro.ops import native

# As in `tiles.h`: numbers of a tile along what is summed over, and columns of an expert's rows that are one item.
DEEP, COLUMNS = 32, 128


# What reading an expert's weights costs, in rows, and how much longer an expert takes that all cores share, who wait
# for each other between its phases: both estimated from steps of 32 and 8 experts.
READING, SHARING = 64, 1.25


# The variants of the kernels that have tiles, and the pieces that a number of float32 is multiplied in, by what
# `torch.set_float32_matmul_precision` asks for: two are, but on tiles of AMX, the number as it is.
PIECES = {
    "avx512": {"highest": 2, "high": 2, "medium": 2},
    "avx512bf16": {"highest": 2, "high": 2, "medium": 1},
    "amx": {"highest": 3, "high": 2, "medium": 1},
}


class Expert(NamedTuple):
    """`struct expert` of `tiles.h`."""

    n: int
    row: int
    slots: int
    slot: int
    width: int
    unit: int
    wide: int
    hidden: int
    block: int


class Layout:
    """Where the rows `bounds[e]:bounds[e+1]` of every expert e, of width `widths[e]`, and its hidden numbers lie: both
    up to the next multiple of `DEEP`, zeros behind.

    An expert is one core's, of the cores that take `whole` in turn, or all cores share the phases of it (`shared`).
    Either way, what only it needs lies in memory that the next one writes again. Results do not depend on it.
    """

    def __init__(self, x: Tensor, token: Tensor, bounds: Sequence[int], widths: Sequence[int]) -> None:
        self.d, self.pieces = x.shape[1], pieces(x.dtype)
        counts = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
        slots, wide = ([_up_to(n, DEEP) for n in numbers] for numbers in (counts, widths))
        sizes = [s * w for s, w in zip(slots, wide, strict=True)]
        self.slot, self.hidden, self.block = _before(slots), _before(sizes), _before([w // DEEP for w in wide])
        columns = counts, bounds, slots, self.slot, widths, _before(widths), wide, self.hidden, self.block
        self.experts = [Expert(*numbers) for numbers in zip(*columns, strict=False)]
        self.n_tokens, self.token = len(x), token.long().contiguous()
        self.table = torch.tensor(self.experts, dtype=torch.int64)
        self.starts, self.order = (torch.empty(n, dtype=torch.int64) for n in (len(x) + 1, 2 * len(token)))
        costs = [(n + READING) * width for n, width in zip(counts, widths, strict=True)]
        self.shared, self.whole = _shared_and_whole(costs, torch.get_num_threads())
        self.workers = min(torch.get_num_threads(), len(self.whole))
        self.most_slots, self.most_hidden = (max((of[e] for e in self.whole), default=0) for of in (slots, sizes))
        self.room_slots = max((slots[e] for e in self.shared), default=0)
        self.room_hidden = max((sizes[e] for e in self.shared), default=0)

    def packed(self, wanted: bool = True) -> Tensor | None:
        """Memory for the packed rows of the experts at work."""
        slots = max(self.workers * self.most_slots, self.room_slots)
        return self._in_pieces(slots * _up_to(self.d, DEEP)) if wanted else None

    def by_units(self, gates: int) -> Tensor:
        """Memory for so many times the hidden numbers of the experts at work, and a tile's columns behind them."""
        whole = self.workers * (gates * self.most_hidden + self.most_slots * DEEP)
        return self._in_pieces(max(whole, gates * self.room_hidden + self.room_slots * DEEP))

    def _in_pieces(self, numbers: int) -> Tensor:
        return torch.empty(numbers * self.pieces, dtype=torch.bfloat16)


def pieces(dtype: torch.dtype) -> int:
    """Times the size of a number in bfloat16 that tiles multiply a number in."""
    return 1 if dtype == torch.bfloat16 else PIECES[native.library().variant][torch.get_float32_matmul_precision()]


def _before(numbers: Sequence[int]) -> list[int]:
    """Sums of those before each, and of all."""
    return [0, *accumulate(numbers)]


def _shared_and_whole(costs: Sequence[float], threads: int) -> tuple[list[int], list[int]]:
    """Experts that all threads share, the dearest, and those that are one thread's each, dearest first: so many of the
    former that all is done soonest."""
    order = sorted(range(len(costs)), key=lambda e: -costs[e])
    best, shares = 0, [0, *(1 << i for i in range(len(order).bit_length()))]
    if threads > 1:
        best = min(shares, key=lambda n: _time([costs[e] for e in order], min(n, len(order)), threads))
    return sorted(order[:best]), order[best:]


def _time(costs: Sequence[float], shared: int, threads: int) -> float:
    """When all is done, if so many experts are shared and each of the others is taken by the first thread free."""
    busy = [0.0] * threads
    for cost in costs[shared:]:
        heapreplace(busy, busy[0] + cost)
    return SHARING * sum(costs[:shared]) / threads + max(busy)


# fields of `struct tiles` that are pointers, in their order
_POINTERS = (
    *("x", "dy", "token", "weight", "experts", "w_in", "w_out"),
    *("x_across", "x_along", "dy_across", "dy_along", "hidden", "dz", "z", "rows", "part"),
    *("out", "dw_in", "dw_out", "dweight", "starts", "order", "whole", "taken"),
)


class _Kernels:
    """One call of the operation: the fields that its kernels share."""

    def __init__(self, layout: Layout, x: Tensor, forward: bool, **tensors: Tensor | None) -> None:
        self.layout, self.columns = layout, -(-layout.d // COLUMNS)
        # kept, because the packed fields are addresses
        self.tensors = tensors | {
            "x": x,
            "token": layout.token,
            "experts": layout.table,
            "starts": layout.starts,
            "order": layout.order,
            "whole": torch.tensor(layout.whole, dtype=torch.int64),
            "taken": torch.zeros(1, dtype=torch.int64),
        }
        numbers = len(layout.token), layout.n_tokens, layout.d, len(layout.experts), int(forward)
        numbers += int(x.dtype == torch.bfloat16), layout.pieces
        numbers += len(layout.whole), layout.most_slots, layout.most_hidden
        pointers = (self.tensors.get(name) for name in _POINTERS)
        self.fields = native.struct_of("tiles", *(0 if tensor is None else tensor for tensor in pointers), *numbers)

    def run(self, kernel: str, items: int) -> None:
        """Run a kernel on so many items."""
        native.run(kernel, native.even_parts(items), self.fields)

    def run_experts(self, *phases: str) -> None:
        """Run the phases on all experts."""
        layout = self.layout
        items = {"tile_pack": [slot // DEEP for slot in layout.slot]}
        items["tile_rows"] = [e * self.columns for e in range(len(layout.experts) + 1)]
        for e in layout.shared:
            for phase in phases:
                first, stop = items.get(phase, layout.block)[e : e + 2]
                native.run(phase, [first + part for part in native.even_parts(stop - first)], self.fields)
        self.run("tile_whole", layout.workers)


def forward(
    x: Float[Tensor, "t d"],
    weight: Float[Tensor, "n"],
    w_in: Float[Tensor, "gs d"],
    w_out: Float[Tensor, "s d"],
    layout: Layout,
    keep: bool,
) -> tuple[Float[Tensor, "t d"], Float[Tensor, "z"] | None]:
    """y, and the pre-activations of all experts where they are to be kept."""
    z = x.new_empty(2 * layout.hidden[-1]) if keep else None
    kernels = _Kernels(
        layout,
        x,
        forward=True,
        **{"weight": weight.float(), "w_in": w_in, "w_out": w_out, "z": z},
        x_across=layout.packed(),
        hidden=layout.by_units(1),
        rows=x.new_empty(layout.slot[-1], layout.d),
        out=(y := torch.empty_like(x)),
    )
    kernels.run("tile_places", 1)
    kernels.run_experts("tile_pack", "tile_hidden", "tile_rows")
    kernels.run("tile_sum", layout.n_tokens)
    return y, z


def backward(
    dy: Float[Tensor, "t d"],
    saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    layout: Layout,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, weight, w_in and w_out from those that the forward pass saved: these and z. `needs` are x, w_in
    and w_out."""
    x, weight, w_in, w_out, z = saved
    dx, dw_in, dw_out = (torch.empty_like(v) if need else None for v, need in zip((x, w_in, w_out), needs, strict=True))
    kernels = _Kernels(
        layout,
        x,
        forward=False,
        **{"dy": dy, "weight": weight.float(), "w_in": w_in, "w_out": w_out, "z": z},
        dy_across=layout.packed(),
        x_along=layout.packed(needs[1]),
        dy_along=layout.packed(needs[2]),
        dz=layout.by_units(2) if needs[0] else None,
        rows=x.new_empty(layout.slot[-1], layout.d) if needs[0] else None,
        part=torch.empty(layout.hidden[-1] // DEEP),
        dweight=(dweight := torch.empty(len(weight))),
        **{"out": dx, "dw_in": dw_in, "dw_out": dw_out},
    )
    kernels.run_experts("tile_pack", "tile_gradients", *(["tile_rows"] if needs[0] else []))
    kernels.run("tile_dweight", len(layout.experts))
    if needs[0]:
        kernels.run("tile_sum", layout.n_tokens)
    return dx, dweight.to(weight.dtype), dw_in, dw_out


def _up_to(n: int, step: int) -> int:
    return -(-n // step) * step

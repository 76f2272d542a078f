"""Gated experts with SiLU on rows sorted by expert, in bfloat16 on tiles of AMX (`expert_tiles.c`)."""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from moestro.ops import native

# As in `tiles.h`: numbers of a tile along what is summed over, and columns of an expert's rows that are one item.
DEEP, COLUMNS = 32, 128


# Bytes that a thread keeps in the cache beside the weights that it reads: half of the smallest that have tiles.
CACHE = 2**20


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
    near_slot: int
    near_hidden: int


class Layout:
    """Where the rows `bounds[e]:bounds[e+1]` of every expert e, of width `widths[e]`, and its hidden numbers lie: both
    up to the next multiple of `DEEP`, zeros behind.

    Experts are taken in `groups`, from one of these numbers to the next: what only they need stays in the cache, in
    memory that the next group writes again. Results do not depend on them.
    """

    def __init__(self, token: Tensor, n_tokens: int, bounds: Sequence[int], widths: Sequence[int], d: int) -> None:
        counts = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
        slots, wide = ([_up_to(n, DEEP) for n in numbers] for numbers in (counts, widths))
        sizes = [s * w for s, w in zip(slots, wide, strict=True)]
        self.slot, self.hidden, self.block = _before(slots), _before(sizes), _before([w // DEEP for w in wide])
        numbers = [2 * s * (3 * _up_to(d, DEEP) + 2 * w) for s, w in zip(slots, wide, strict=True)]
        self.groups = _groups(numbers, CACHE * torch.get_num_threads())
        first = [a for a, b in zip(self.groups, self.groups[1:], strict=False) for _ in range(b - a)]
        near = ([of[e] - of[start] for e, start in enumerate(first)] for of in (self.slot, self.hidden))
        columns = counts, bounds, slots, self.slot, widths, _before(widths), wide, self.hidden, self.block, *near
        self.experts = [Expert(*numbers) for numbers in zip(*columns, strict=False)]
        self.n_tokens, self.token = n_tokens, token.long().contiguous()
        self.table = torch.tensor(self.experts, dtype=torch.int64)
        self.starts, self.order = (torch.empty(n, dtype=torch.int64) for n in (n_tokens + 1, 2 * len(token)))

    def most(self, before: Sequence[int]) -> int:
        """The greatest number of a group, of `slot` or `hidden`."""
        return max((before[b] - before[a] for a, b in zip(self.groups, self.groups[1:], strict=False)), default=0)


def _before(numbers: Sequence[int]) -> list[int]:
    """Sums of those before each, and of all."""
    return [0, *accumulate(numbers)]


def _groups(sizes: Sequence[int], limit: int) -> list[int]:
    """Bounds of groups of consecutive experts whose sizes add up to the limit at most, or that are one expert."""
    bounds, total = [0], 0
    for e, size in enumerate(sizes):
        if total + size > limit and e > bounds[-1]:
            bounds.append(e)
            total = 0
        total += size
    return [*bounds, len(sizes)] if len(sizes) else bounds


# fields of `struct tiles` that are pointers, in their order
_POINTERS = (
    *("x", "dy", "token", "weight", "experts", "w_in", "w_out"),
    *("x_across", "x_along", "dy_across", "dy_along", "hidden", "dz", "z", "rows", "part"),
    *("out", "dw_in", "dw_out", "dweight", "starts", "order"),
)


class _Kernels:
    """One call of the operation: the fields that its kernels share."""

    def __init__(self, layout: Layout, d: int, weighted: bool, **tensors: Tensor | None) -> None:
        self.layout, self.columns = layout, -(-d // COLUMNS)
        # kept, because the packed fields are addresses
        self.tensors = tensors | {
            "token": layout.token,
            "experts": layout.table,
            "starts": layout.starts,
            "order": layout.order,
        }
        numbers = len(layout.token), layout.n_tokens, d, len(layout.experts), int(weighted)
        pointers = (self.tensors.get(name) for name in _POINTERS)
        self.fields = native.struct_of("tiles", *(0 if tensor is None else tensor for tensor in pointers), *numbers)

    def run(self, kernel: str, items: int) -> None:
        """Run a kernel on so many items."""
        native.run(kernel, native.even_parts(items), self.fields)

    def run_group(self, kernel: str, before: Sequence[int], group: tuple[int, int]) -> None:
        """Run a kernel on the items of a group's experts; `before` are those before each expert."""
        first, stop = (before[e] for e in group)
        native.run(kernel, [first + part for part in native.even_parts(stop - first)], self.fields)

    def run_groups(self, *kernels: str) -> None:
        """Run kernels on the experts, group by group."""
        layout = self.layout
        items = {"tile_pack": [slot // DEEP for slot in layout.slot]}
        items["tile_rows"] = [e * self.columns for e in range(len(layout.experts) + 1)]
        for group in zip(layout.groups, layout.groups[1:], strict=False):
            for kernel in kernels:
                self.run_group(kernel, items.get(kernel, layout.block), group)


def forward(
    x: Float[Tensor, "t d"],
    weight: Float[Tensor, "n"],
    w_in: Float[Tensor, "gs d"],
    w_out: Float[Tensor, "s d"],
    layout: Layout,
    keep: bool,
) -> tuple[Float[Tensor, "t d"], Float[Tensor, "z"] | None]:
    """y, and the pre-activations of all experts where they are to be kept."""
    d, slots = x.shape[1], layout.most(layout.slot)
    z = x.new_empty(2 * layout.hidden[-1]) if keep else None
    kernels = _Kernels(
        layout,
        d,
        weighted=True,
        **{"x": x, "weight": weight.float(), "w_in": w_in, "w_out": w_out, "z": z},
        x_across=x.new_empty(slots * _up_to(d, DEEP)),
        hidden=x.new_empty(layout.most(layout.hidden) + slots * DEEP),
        rows=x.new_empty(layout.slot[-1], d),
        out=(y := torch.empty_like(x)),
    )
    kernels.run("tile_places", 1)
    kernels.run_groups("tile_pack", "tile_hidden", "tile_rows")
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
    d, slots = x.shape[1], layout.most(layout.slot)
    dx, dw_in, dw_out = (torch.empty_like(v) if need else None for v, need in zip((x, w_in, w_out), needs, strict=True))

    def packed(wanted: bool) -> Tensor | None:
        return x.new_empty(slots * _up_to(d, DEEP)) if wanted else None

    kernels = _Kernels(
        layout,
        d,
        weighted=False,
        **{"x": x, "dy": dy, "weight": weight.float(), "w_in": w_in, "w_out": w_out, "z": z},
        **{"dy_across": packed(True), "x_along": packed(needs[1]), "dy_along": packed(needs[2])},
        dz=x.new_empty(2 * layout.most(layout.hidden) + slots * DEEP) if needs[0] else None,
        rows=x.new_empty(layout.slot[-1], d) if needs[0] else None,
        part=torch.empty(layout.hidden[-1] // DEEP),
        dweight=(dweight := torch.empty(len(weight))),
        **{"out": dx, "dw_in": dw_in, "dw_out": dw_out},
    )
    kernels.run_groups("tile_pack", "tile_gradients", *(["tile_rows"] if needs[0] else []))
    kernels.run("tile_dweight", len(layout.experts))
    if needs[0]:
        kernels.run("tile_sum", layout.n_tokens)
    return dx, dweight.to(weight.dtype), dw_in, dw_out


def _up_to(n: int, step: int) -> int:
    return -(-n // step) * step

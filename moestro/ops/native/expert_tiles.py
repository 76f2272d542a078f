"""Gated experts with SiLU on rows sorted by expert, in bfloat16 on tiles of AMX (`expert_tiles.c`)."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from moestro.ops import native

# As in `tiles.h`: rows or columns of a tile of results, and numbers along what is summed over.
SIDE, DEEP = 16, 32


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


class Layout:
    """Where the rows `bounds[e]:bounds[e+1]` of every expert e, of width `widths[e]`, and its hidden numbers lie: both
    up to the next multiple of `DEEP`, zeros behind."""

    def __init__(self, token: Tensor, n_tokens: int, bounds: Sequence[int], widths: Sequence[int]) -> None:
        counts = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
        slots, wide = ([-(-n // DEEP) * DEEP for n in numbers] for numbers in (counts, widths))
        sizes = [s * w for s, w in zip(slots, wide, strict=True)]
        columns = zip(
            counts, bounds, slots, _before(slots), widths, _before(widths), wide, _before(sizes), strict=False
        )
        self.experts = [Expert(*numbers) for numbers in columns]
        self.n_slots, self.n_hidden = sum(slots), sum(sizes)
        self.n_tokens, self.token = n_tokens, token.long().contiguous()
        self.table = torch.tensor(self.experts, dtype=torch.int64)
        self.starts, self.order = (torch.empty(n, dtype=torch.int64) for n in (n_tokens + 1, 2 * len(token)))

    def items(self, of: Callable[[Expert], int]) -> tuple[Tensor, list[int]]:
        """Where the items of every expert begin, and bounds of the parts that threads take."""
        bounds = [0, *accumulate(map(of, self.experts))]
        return torch.tensor(bounds, dtype=torch.int64), native.even_parts(bounds[-1])


def _before(numbers: Sequence[int]) -> list[int]:
    return [0, *accumulate(numbers)][:-1]


# fields of `struct tiles` that are pointers, in their order
_POINTERS = (
    *("x", "dy", "token", "weight", "experts", "items", "w_in", "w_out"),
    *("x_across", "x_along", "dy_across", "dy_along", "hidden", "z", "dz_units", "dz", "scaled", "rows", "part"),
    *("out", "dw_in", "dw_out", "dweight", "starts", "order"),
)


class _Kernels:
    """One call of the operation: the fields that its kernels share."""

    def __init__(self, layout: Layout, d: int, **tensors: Tensor) -> None:
        self.layout, self.d = layout, d
        self.tensors = tensors | {
            "token": layout.token,
            "experts": layout.table,
            "starts": layout.starts,
            "order": layout.order,
        }

    def run(self, kernel: str, of: Callable[[Expert], int] | int, weighted: bool = False) -> None:
        """Run a kernel on so many items, or so many of each expert."""
        items, parts = (torch.zeros(1), native.even_parts(of)) if isinstance(of, int) else self.layout.items(of)
        tensors, layout = self.tensors | {"items": items}, self.layout
        numbers = len(layout.token), layout.n_tokens, self.d, len(layout.experts), int(weighted)
        native.run(kernel, parts, *(tensors.get(name, 0) for name in _POINTERS), *numbers)


def forward(
    x: Float[Tensor, "t d"],
    weight: Float[Tensor, "n"],
    w_in: Float[Tensor, "gs d"],
    w_out: Float[Tensor, "s d"],
    layout: Layout,
    keep: bool,
) -> tuple[Float[Tensor, "t d"], Float[Tensor, "z"] | None]:
    """y, and the pre-activations of all experts where they are to be kept."""
    d, across = x.shape[1], layout.n_slots * _wide(x)
    z = x.new_empty(2 * layout.n_hidden) if keep else None
    kernels = _Kernels(
        layout,
        d,
        **{"x": x, "weight": weight.float(), "w_in": w_in, "w_out": w_out},
        **{"x_across": x.new_empty(across), "hidden": x.new_empty(layout.n_hidden)},
        **{"rows": x.new_empty(layout.n_slots, d), "out": (y := torch.empty_like(x))},
        **({} if z is None else {"z": z}),
    )
    kernels.run("tile_places", 1)
    kernels.run("tile_pack", lambda e: e.slots // DEEP)
    kernels.run("tile_hidden", lambda e: e.wide // SIDE if e.n else 0)
    kernels.run("tile_rows", lambda e: -(-d // (2 * DEEP)))
    kernels.run("tile_sum", layout.n_tokens, weighted=True)
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
    d, across, hidden = x.shape[1], layout.n_slots * _wide(x), layout.n_hidden
    dx, dw_in, dw_out = (torch.empty_like(v) if need else None for v, need in zip((x, w_in, w_out), needs, strict=True))
    wanted = {"out": dx, "dw_in": dw_in, "dw_out": dw_out}
    kernels = _Kernels(
        layout,
        d,
        **{"x": x, "dy": dy, "weight": weight.float(), "w_in": w_in, "w_out": w_out, "z": z},
        **{"dy_across": x.new_empty(across), "scaled": x.new_empty(hidden)},
        **{"dz": x.new_empty(2 * hidden), "dz_units": x.new_empty(2 * hidden)},
        **{"rows": x.new_empty(layout.n_slots, d), "part": torch.empty(hidden // DEEP)},
        **({} if dw_in is None else {"x_along": x.new_empty(across)}),
        **({} if dw_out is None else {"dy_along": x.new_empty(across)}),
        **{"dweight": (dweight := torch.empty(len(weight)))},
        **{name: gradient for name, gradient in wanted.items() if gradient is not None},
    )
    kernels.run("tile_pack", lambda e: e.slots // DEEP)
    kernels.run("tile_dhidden", lambda e: e.wide // DEEP if e.n else 0)
    if dw_in is not None or dw_out is not None:
        kernels.run("tile_dweights", lambda e: 3 * e.wide // DEEP)
    kernels.run("tile_dweight", len(layout.experts))
    if dx is not None:
        kernels.run("tile_rows", lambda e: -(-d // (2 * DEEP)))
        kernels.run("tile_sum", layout.n_tokens)
    return dx, dweight.to(weight.dtype), dw_in, dw_out


def _wide(x: Tensor) -> int:
    return -(-x.shape[1] // DEEP) * DEEP

"""Which program computes which tile of which expert: a table built on the device, and how kernels read it.

The plan is int64 [9, n_experts + 1]. Kernels are persistent: program p computes tiles p, p + programs, ... and finds
the expert of a tile by binary search, so that nothing about the routing is ever known on the host.
"""

from functools import lru_cache
from typing import Any, NamedTuple, no_type_check

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction  # pyright: ignore[reportMissingImports]

# Rows of the plan: first row and first unit of each expert, where its hidden rows start; tiles before each expert of
# the three kinds; which expert comes how many-th among the tiles of the last two kinds; units before each expert's
# partial weight gradients, which experts with more rows than `split` have.
_ROWS = tl.constexpr(0)
_UNITS = tl.constexpr(1)
_START = tl.constexpr(2)
_UP = tl.constexpr(3)
_DOWN = tl.constexpr(4)
_WEIGHT = tl.constexpr(5)
_DOWN_ORDER = tl.constexpr(6)
_WEIGHT_ORDER = tl.constexpr(7)
_PARTS = tl.constexpr(8)
N_PLAN_ROWS = 9

# Programs under the interpreter: more than one, so that each skips tiles.
_INTERPRETED_PROGRAMS = 3
# Row tiles that share a column tile before the next column is begun, so that weights stay in the cache.
_GROUP = 8


class Blocks(NamedTuple):
    """Tile sizes: token rows, hidden units, model columns, and the step along the summed dimension; the warps that
    compute a tile with rows, and a tile of a weight gradient."""

    rows: int
    units: int
    model: int
    inner: int
    row_warps: int
    weight_warps: int
    stages: int

    def row_options(self) -> dict[str, int]:
        """How to launch a kernel whose tiles have rows."""
        return {"num_warps": self.row_warps, "num_stages": self.stages}

    def weight_options(self) -> dict[str, int]:
        """How to launch a kernel whose tiles are parts of a weight's gradient."""
        return {"num_warps": self.weight_warps, "num_stages": self.stages}


def choose_blocks(n_rows: int, n_experts: int, d_model: int, widest: int, dtype: torch.dtype) -> Blocks:
    """Tile sizes by rule, from what the host knows without asking the device; no benchmark runs behind the caller.

    Row tiles follow the mean number of rows per expert, the other sides shrink to what there is to compute.
    """
    if interpreted():
        return Blocks(rows=16, units=16, model=16, inner=16, row_warps=4, weight_warps=4, stages=1)
    mean = n_rows // max(n_experts, 1)
    rows = 128 if mean >= 256 else 64 if mean >= 64 else 32 if mean >= 16 else 16
    wide = dtype.itemsize > 2
    most = 64 if wide else 128
    units, model = (min(most, max(16, power_of_two(n))) for n in (widest, d_model))
    row_warps, weight_warps = (
        8 if tile * dtype.itemsize >= 2 * 128 * 128 else 4 for tile in (rows * max(units, model), units * model)
    )
    return Blocks(rows, units, model, 32 if wide else 64, row_warps, weight_warps, stages=3)


def power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()


def interpreted() -> bool:
    """Whether kernels run under Triton's interpreter, which takes tensors of the CPU."""
    return isinstance(_plan_kernel, InterpretedFunction)


def programs(device: torch.device) -> int:
    """Programs of a persistent kernel: two for each multiprocessor."""
    if interpreted():
        return _INTERPRETED_PROGRAMS
    return 2 * _multiprocessors(device)


@lru_cache(maxsize=16)
def _multiprocessors(device: torch.device) -> int:
    return torch.get_device_module(device).get_device_properties(device).multi_processor_count


def search_steps(n_experts: int) -> int:
    """Halvings that leave one of `n_experts`."""
    return max(n_experts - 1, 0).bit_length()


def launch(kernel: Any, programs: int | tuple[Any, ...], *arguments: Any, **constants: Any) -> None:
    """Run that many programs of a kernel, or a grid of them, where its first argument, a tensor, is: Triton itself
    starts kernels on the current device, wherever their tensors are."""
    with torch.accelerator.device_index(arguments[0].device.index):
        kernel[(programs,) if isinstance(programs, int) else programs](*arguments, **constants)


def make_plan(offsets: Tensor, experts: Tensor, d_model: int, blocks: Blocks, split: int) -> Tensor:
    """The plan of a routing with row bounds `offsets` for experts laid out as `experts` (int64
    [2, n_experts + 1]: first units; the experts in the order of their tiles), without host
    synchronisation. Weight gradients are summed in parts of `split` rows where an expert has more; 0: never.

    Tiles of one kind cost what their expert's width (rows x width products) or number of rows (weight gradients)
    makes them cost; the dearest come first, which evens out when programs finish.
    """
    n_experts = len(offsets) - 1
    plan = offsets.new_empty(N_PLAN_ROWS, n_experts + 1, dtype=torch.int64)
    busiest_first = offsets.diff().argsort(descending=True, stable=True)
    launch(
        _plan_kernel, 1, offsets, experts, busiest_first, plan, d_model, n_experts, split,
        BM=blocks.rows, BU=blocks.units, BD=blocks.model, BLOCK=power_of_two(n_experts + 1),
    )  # fmt: skip
    return plan


@triton.jit
@no_type_check
def _plan_kernel(offsets, experts, busiest_first, plan, d, n_experts, split,
                 BM: tl.constexpr, BU: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    i = tl.arange(0, BLOCK)
    inside = i < n_experts
    here = i <= n_experts
    stride = n_experts + 1
    row = tl.load(offsets + i, mask=here, other=0)
    unit = tl.load(experts + i, mask=here, other=0)
    n = tl.where(inside, tl.load(offsets + i + 1, mask=inside, other=0) - row, 0)
    w = tl.where(inside, tl.load(experts + i + 1, mask=inside, other=0) - unit, 0)
    tl.store(plan + _ROWS * stride + i, row, mask=here)
    tl.store(plan + _UNITS * stride + i, unit, mask=here)
    _store_before(plan + _START * stride + i, n * _padded(w), here)
    _store_before(plan + _UP * stride + i, tl.cdiv(n, BM) * tl.cdiv(w, BU), here)
    parts = _parts(n, split)
    _store_before(plan + _PARTS * stride + i, tl.where(parts > 1, parts * w, 0), here)
    columns = tl.cdiv(d, BD)
    e = tl.load(experts + stride + i, mask=inside, other=0)
    n = tl.where(inside, tl.load(offsets + e + 1) - tl.load(offsets + e), 0)
    _store_before(plan + _DOWN * stride + i, tl.cdiv(n, BM) * columns, here)
    tl.store(plan + _DOWN_ORDER * stride + i, e, mask=here)
    e = tl.load(busiest_first + i, mask=inside, other=0)
    w = tl.where(inside, tl.load(experts + e + 1) - tl.load(experts + e), 0)
    parts = _parts(tl.load(offsets + e + 1) - tl.load(offsets + e), split)
    _store_before(plan + _WEIGHT * stride + i, tl.cdiv(w, BU) * columns * parts, here)
    tl.store(plan + _WEIGHT_ORDER * stride + i, e, mask=here)


@triton.jit
@no_type_check
def _store_before(at, count, mask):
    """Sum of the counts before each."""
    tl.store(at, tl.cumsum(count, 0) - count, mask=mask)


@triton.jit
@no_type_check
def _parts(n, split):
    """Parts in which n rows are summed for a weight's gradient: one, or as many as have `split` rows."""
    return tl.where((split > 0) & (n > split), (n + split - 1) // tl.maximum(split, 1), 1)


@triton.jit
@no_type_check
def _padded(w):
    """Stride of hidden rows of width w: every row starts at 16 bytes."""
    return (w + 7) // 8 * 8


@triton.jit
@no_type_check
def _owner(prefix, n_experts, tile, STEPS: tl.constexpr):
    """The last position whose prefix is not beyond the tile."""
    low = 0
    high = n_experts
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        before = tl.load(prefix + middle) <= tile
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
@no_type_check
def _expert(plan, stride, e):
    """First row, number of rows, first unit, width and first hidden element (of one gate) of an expert."""
    row = tl.load(plan + _ROWS * stride + e)
    n = (tl.load(plan + _ROWS * stride + e + 1) - row).to(tl.int32)
    unit = tl.load(plan + _UNITS * stride + e)
    w = (tl.load(plan + _UNITS * stride + e + 1) - unit).to(tl.int32)
    start = tl.multiple_of(tl.load(plan + _START * stride + e), 8)
    return row, n, unit, w, start


@triton.jit
@no_type_check
def _place(local, n_rows, n_columns, GROUP: tl.constexpr):
    """Row and column of a tile of an expert: GROUP row tiles for one column tile, then the next column."""
    whole = GROUP * n_columns
    first = local // whole * GROUP
    size = tl.minimum(n_rows - first, GROUP)
    inside = local % whole
    return first + inside % size, inside // size

"""Where the part of a tensor that a rank holds lies in the whole tensor."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

ATTRIBUTE = "moestro_layout"
Rows = slice | int


@dataclass(frozen=True)
class Piece:
    """A block of a tensor: where it begins in the whole tensor, where it begins in the rank's own, and its size."""

    whole: tuple[int, ...]
    own: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def in_whole(self) -> tuple[slice, ...]:
        """Its place in the whole tensor."""
        return tuple(slice(start, start + n) for start, n in zip(self.whole, self.size, strict=True))

    @property
    def in_own(self) -> tuple[slice, ...]:
        """Its place in the rank's own tensor."""
        return tuple(slice(start, start + n) for start, n in zip(self.own, self.size, strict=True))


@dataclass(frozen=True)
class Layout:
    """A whole tensor's shape and the pieces of it that this rank holds. Ranks that hold the same pieces are `copies`, a
    process group over which gradients must be summed; None where this rank holds them alone."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    copies: Any = None

    @property
    def n_copies(self) -> int:
        """How many ranks hold these pieces."""
        return 1 if self.copies is None else dist.get_world_size(self.copies)

    def first_dims(self, n: int) -> "Layout":
        """The layout of a tensor of the first `n` dimensions only: one number for each row of a table."""
        pieces = tuple(Piece(piece.whole[:n], piece.own[:n], piece.size[:n]) for piece in self.pieces)
        return Layout(self.shape[:n], pieces, self.copies)


def n_elsewhere(parameters: Iterable[Tensor]) -> int:
    """Numbers of these parameters of which this rank counts none as its own: of experts that other ranks hold."""
    held = ((own_layout(parameter), parameter.numel()) for parameter in parameters)
    return sum(math.prod(layout.shape) - own for layout, own in held if layout is not None)


def lay_out(tensor: Tensor, layout: Layout) -> None:
    """Remember where a tensor that is one rank's own lies in the whole."""
    setattr(tensor, ATTRIBUTE, layout)


def own_layout(tensor: Tensor) -> Layout | None:
    """What `lay_out` was told of a tensor; None for tensors that are whole, or sharded by DTensor."""
    return getattr(tensor, ATTRIBUTE, None)


def whole_layout(shape: Sequence[int]) -> Layout:
    """That of a tensor which every rank has whole."""
    return Layout(tuple(shape), (Piece((0,) * len(shape), (0,) * len(shape), tuple(shape)),))


def layout_of(tensor: Tensor) -> Layout:
    """Where a tensor of any kind lies: of one rank's own, of a DTensor, or whole on every rank."""
    if (own := own_layout(tensor)) is not None:
        return own
    shape = tuple(tensor.shape)
    if not is_sharded(tensor):
        return whole_layout(shape)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    size, start = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)  # type: ignore[attr-defined]
    return Layout(shape, (Piece(tuple(start), (0,) * len(shape), tuple(size)),) if all(size) else ())


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """The rank's own part of a tensor, sharing its memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, on every rank; every rank must call it. What is whole already is returned as it is."""
    if is_sharded(tensor):
        return tensor.full_tensor()  # type: ignore[attr-defined]
    layout = own_layout(tensor)
    if layout is None:
        return tensor
    total = torch.zeros(layout.shape, dtype=tensor.dtype, device=tensor.device)
    # of copies the first one counts
    for piece in layout.pieces if layout.copies is None or dist.get_rank(layout.copies) == 0 else ():
        total[piece.in_whole] = tensor[piece.in_own]
    dist.all_reduce(total)
    return total


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor `value`, as it holds `like`; a single number belongs to every part."""
    if value.ndim == 0:
        return value
    own = value.new_zeros(local(like).shape)
    for piece in layout_of(like).pieces:
        own[piece.in_own] = value[piece.in_whole]
    return own


@torch.no_grad()
def write_rows(tensor: Tensor, rows: Rows, value: Tensor | float, layout: Layout | None = None) -> None:
    """tensor[rows] = value, of the rows of the whole tensor; each rank writes what it holds of them."""
    layout, own = layout or layout_of(tensor), local(tensor)
    first, last = (rows, rows + 1) if isinstance(rows, int) else rows.indices(layout.shape[0])[:2]
    for piece in layout.pieces:
        start, stop = max(first, piece.whole[0]), min(last, piece.whole[0] + piece.size[0])
        if start >= stop:
            continue
        shift = piece.own[0] - piece.whole[0]
        place = (slice(start + shift, stop + shift), *piece.in_own[1:])
        if isinstance(value, Tensor):
            block = value.expand(last - first, *layout.shape[1:])
            own[place] = block[(slice(start - first, stop - first), *piece.in_whole[1:])].to(own)
        else:
            own[place] = value


def row_pieces(places: Sequence[tuple[slice, slice]], shape: Sequence[int], copies: Any = None) -> Layout:
    """The layout of a tensor of which this rank holds some rows, as (rows of the whole, rows of its own) pairs; `shape`
    is that of the whole tensor. Pairs of no rows are no pieces: another rank's may begin at the same place."""
    rest = tuple(shape[1:])
    zeros = (0,) * len(rest)
    pieces = tuple(
        Piece((there.start, *zeros), (here.start, *zeros), (there.stop - there.start, *rest))
        for there, here in places
        if there.stop > there.start
    )
    return Layout(tuple(shape), pieces, copies)

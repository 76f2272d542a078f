"""Narrower experts: which hidden units go."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from moestro.compress.budget import share_of
from moestro.compress.plan import PlanError
from moestro.compress.source import RunSource
from moestro.experts import FFNBank
from moestro.formats import Checkpoint


def unit_norms(source: Checkpoint | RunSource, layer: int, expert: int) -> Float[Tensor, "w"]:
    """||gate_u|| ||up_u|| ||down_u|| of every hidden unit of an expert (without the first, where it has no gate), in
    float64: 0 for a unit that adds nothing.

    Raises: PlanError for a bank of our own that is no `FFNBank`.
    """
    if isinstance(source, Checkpoint):
        found = source.expert(layer, expert)
        return found.gate.double().norm(dim=1) * found.up.double().norm(dim=1) * found.down.double().norm(dim=0)
    name, moe = source.mixtures[layer]
    bank = moe.bank
    if not isinstance(bank, FFNBank):
        raise PlanError(f"{name}: experts of {type(bank).__name__} have no units to remove; allowed: kind ffn")
    stem = f"{name}.branches.{[branch is bank for branch in moe.branches].index(True)}"
    inside = source.read(f"{stem}.w_in.weight")[bank.w_in.rows_of(expert)]
    out = source.read(f"{stem}.w_out.weight")[bank.w_out.rows_of(expert)]
    parts = [part.double().norm(dim=1) for part in (*inside.chunk(2 if bank.glu else 1), out)]
    return torch.stack(parts).prod(0)


def wide_enough(
    sizes: Sequence[Float[Tensor, "_"]], ratio: float, together: bool = False
) -> tuple[tuple[int, ...], ...]:
    """The units that every expert keeps, of the largest sizes, ties to the lower unit: the same share of each expert's,
    or of all of them `together`. Every expert keeps one at least."""
    if together:
        return _together(sizes, ratio)
    kept = []
    for size in sizes:
        kept.append(_largest(size, max(1, len(size) - share_of(ratio, len(size)))))
    return tuple(kept)


def _together(sizes: Sequence[Float[Tensor, "_"]], ratio: float) -> tuple[tuple[int, ...], ...]:
    total = sum(map(len, sizes))
    # an expert's best unit, one of it, comes before all others
    protected = [size.index_fill(0, torch.tensor(_largest(size, 1)), torch.inf) for size in sizes]
    chosen = set(_largest(torch.cat(protected), max(len(sizes), total - share_of(ratio, total))))
    kept, first = [], 0
    for size in sizes:
        kept.append(tuple(unit for unit in range(len(size)) if first + unit in chosen))
        first += len(size)
    return tuple(kept)


def _largest(size: Float[Tensor, "_"], n: int) -> tuple[int, ...]:
    return tuple(sorted(size.sort(descending=True, stable=True).indices[:n].tolist()))

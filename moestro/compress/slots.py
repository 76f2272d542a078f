"""The numbers that experts have in the compressed folder, dead ones included."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from moestro.compress.feasible import Layout, Limits
from moestro.compress.plan import LayerPlan, Plan


@dataclass(frozen=True)
class Slots:
    """`order[s]` is the new expert in slot s, None for a dead one that fills it."""

    order: tuple[int | None, ...]

    @property
    def count(self) -> int:
        """Slots."""
        return len(self.order)

    @cached_property
    def dead(self) -> tuple[int, ...]:
        """Slots of dead experts."""
        return tuple(slot for slot, new in enumerate(self.order) if new is None)

    def of(self, new: int) -> int:
        """The slot of a new expert."""
        return self.order.index(new)


def slots_of(plan: Plan, limits: Limits, layout: Layout) -> dict[int, Slots]:
    """{layer: its slots}: survivors in order; where `layout` is padded, dead experts at the end of every routing group
    until all groups of all layers are equal."""
    if layout != "padded":
        return {layer.layer: Slots(tuple(range(layer.n_kept))) for layer in plan.layers}
    size = max(count for layer in plan.layers for count in limits.per_group(layer))
    return {layer.layer: Slots(_padded(layer, limits.per_group(layer), size)) for layer in plan.layers}


def _padded(layer: LayerPlan, counts: Sequence[int], size: int) -> tuple[int | None, ...]:
    order: list[int | None] = []
    first = 0
    for count in counts:
        order += [*range(first, first + count), *[None] * (size - count)]
        first += count
    return tuple(order)

"""Where the matrices of one expert are stored: a tensor for each, or a part of one tensor for all experts."""

import re
from dataclasses import dataclass

from torch import Tensor

PROJECTIONS = ("gate", "up", "down")


@dataclass(frozen=True)
class Stored:
    """Part of a tensor: entry `expert` of its first dimension (None: the whole tensor), and of that `rows` and
    `columns`, then transposed where the folder keeps matrices [in out] instead of [out in]."""

    name: str
    expert: int | None = None
    rows: slice | None = None
    columns: slice | None = None
    transposed: bool = False

    def of(self, entry: Tensor) -> Tensor:
        """The part, out of what was read: the whole tensor, or its entry `expert`."""
        part = entry if self.columns is None else entry[..., self.columns]
        part = part if self.rows is None else part[self.rows]
        return part.T if self.transposed else part


@dataclass(frozen=True)
class PerExpert:
    """One 2-D tensor [out in] for each expert and projection; templates with {layer} and {expert}."""

    gate: str
    up: str
    down: str

    def locate(self, layer: int, expert: int, width: int) -> dict[str, Stored]:
        """{"gate", "up", "down"} -> its tensor."""
        return {part: Stored(getattr(self, part).format(layer=layer, expert=expert)) for part in PROJECTIONS}

    @property
    def member(self) -> re.Pattern[str]:
        """Matches every tensor that belongs to one expert, companions (scales, zero points) included; groups `layer`
        and `expert` are its numbers."""
        before, after = self.down.split("{expert}")[0].split("{layer}")
        return re.compile(rf"{re.escape(before)}(?P<layer>\d+){re.escape(after)}(?P<expert>\d+)\.")


@dataclass(frozen=True)
class Fused:
    """All experts of a layer in one 3-D tensor `gate_up` [e 2w d] (first the gate's rows) and one `down` [e d w].

    `transposed`: [e d 2w] and [e w d]; `interleaved`: gate and up take turns instead of following each other. Biases
    are [e 2w] and [e d].
    """

    gate_up: str
    down: str
    gate_up_bias: str | None = None
    down_bias: str | None = None
    transposed: bool = False
    interleaved: bool = False

    def locate(self, layer: int, expert: int, width: int) -> dict[str, Stored]:
        """{"gate", "up", "down"}, and {"gate_bias", "up_bias", "down_bias"} where there are biases -> its part."""
        halves = {"gate": slice(0, width), "up": slice(width, 2 * width)}
        if self.interleaved:
            halves = {"gate": slice(0, None, 2), "up": slice(1, None, 2)}
        axis = "columns" if self.transposed else "rows"
        found: dict[str, Stored] = {}
        for part, half in halves.items():
            name = self.gate_up.format(layer=layer)
            found[part] = Stored(name, expert, transposed=self.transposed, **{axis: half})
            if self.gate_up_bias is not None:
                found[f"{part}_bias"] = Stored(self.gate_up_bias.format(layer=layer), expert, rows=half)
        found["down"] = Stored(self.down.format(layer=layer), expert, transposed=self.transposed)
        if self.down_bias is not None:
            found["down_bias"] = Stored(self.down_bias.format(layer=layer), expert)
        return found

    def tensors(self, layer: int) -> tuple[str, ...]:
        """Names of the tensors whose first dimension counts the layer's experts."""
        names = (self.gate_up, self.down, self.gate_up_bias, self.down_bias)
        return tuple(name.format(layer=layer) for name in names if name is not None)

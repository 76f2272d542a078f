"""What a computation costs, in floating-point operations (one multiply-add = 2 FLOPs)."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Cost:
    """FLOPs. `useful` is what the mathematics needs; `computed` adds what is executed and thrown away (padding, the
    masked half of causal attention). Values may be 0-d tensors, so that counting never waits for a device."""

    useful: float | Tensor
    computed: float | Tensor

    @staticmethod
    def exact(flops: float | Tensor) -> "Cost":
        """A cost with nothing wasted."""
        return Cost(flops, flops)

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.useful + other.useful, self.computed + other.computed)

    def __mul__(self, factor: float) -> "Cost":
        return Cost(self.useful * factor, self.computed * factor)

    def item(self) -> "Cost":
        """The same cost as plain numbers (waits for the device)."""
        return Cost(float(self.useful), float(self.computed))


NOTHING = Cost(0.0, 0.0)

"""What a computation costs: floating-point operations (one multiply-add = 2 FLOPs), and memory kept for backward."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import Tensor

# Backward costs twice the forward: one product for the inputs' gradients, one for the weights'.
TRAINING_FLOPS = 3.0


@dataclass(frozen=True)
class Cost:
    """FLOPs. `useful` is what the mathematics needs; `computed` adds what is executed and thrown away (padding, the
    masked half of causal attention). `spared` is what training does not compute of the two products that a backward
    pass makes of each: the gradients of weights that do not learn. Values may be 0-d tensors, so that counting never
    waits for a device."""

    useful: float | Tensor
    computed: float | Tensor
    spared: float | Tensor = 0.0

    @staticmethod
    def exact(flops: float | Tensor) -> "Cost":
        """A cost with nothing wasted."""
        return Cost(flops, flops)

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.useful + other.useful, self.computed + other.computed, self.spared + other.spared)

    def __mul__(self, factor: float) -> "Cost":
        return Cost(self.useful * factor, self.computed * factor, self.spared * factor)

    def of_weights(self, weights: Iterable[Tensor]) -> "Cost":
        """The cost of products with these weights, where it is known whether they learn: none does, and training spares
        their gradients, or some do."""
        learns = [weight.requires_grad for weight in weights]
        return replace(self, spared=self.useful) if learns and not any(learns) else self

    def forward_only(self) -> "Cost":
        """The cost of what has no backward pass."""
        return replace(self, spared=2 * self.useful)

    def training(self) -> "Cost":
        """Forward and backward pass: every product once more for the gradient of its input, those with weights that
        learn once more for theirs. Below the first weight that learns no gradient of inputs is needed; it is counted
        all the same."""
        useful, computed = (flops * TRAINING_FLOPS - self.spared for flops in (self.useful, self.computed))
        return Cost(useful, computed)

    def item(self) -> "Cost":
        """The same cost as plain numbers (waits for the device)."""
        return Cost(float(self.useful), float(self.computed), float(self.spared))


def of_products(n_rows: int, *weights: Tensor) -> Cost:
    """Forward FLOPs of so many rows times each of these matrices."""
    return sum((Cost.exact(2.0 * n_rows * weight.numel()).of_weights([weight]) for weight in weights), NOTHING)


NOTHING = Cost(0.0, 0.0)


@dataclass(frozen=True)
class Kept:
    """What a forward pass leaves for its backward pass: `numbers` in the dtype in which matrices are multiplied, and
    `bytes` of whatever else (float32 scores, ids)."""

    numbers: float = 0.0
    bytes: float = 0.0

    @staticmethod
    def of_flops(flops: float, d_model: int) -> "Kept":
        """That of a feed-forward network of which only its FLOPs are known: a gated one of width w costs 6 d w and
        leaves 4 w numbers (gate, its activation, up, their product)."""
        return Kept(flops / (1.5 * d_model))

    def __add__(self, other: "Kept") -> "Kept":
        return Kept(self.numbers + other.numbers, self.bytes + other.bytes)

    def __mul__(self, factor: float) -> "Kept":
        return Kept(self.numbers * factor, self.bytes * factor)

    def total(self, itemsize: int) -> float:
        """Bytes, where a product's numbers have `itemsize`."""
        return self.numbers * itemsize + self.bytes

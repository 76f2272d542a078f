"""`DenseMLP`: an expert for every token made of given linear modules."""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from moestro.cost import Cost, Kept, of_products
from moestro.routing import Routing


class DenseMatrices(NamedTuple):
    """gate [w d] (None without one), up [w d], down [d w] and their biases [w], [w], [d] (None where there are none);
    views of the parameters."""

    gate: Tensor | None
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None


class DenseMLP(nn.Module):
    """FFN(x) = down(act(gate(x)) * up(x)), or down(act(up(x))) without `gate`, on every token; ignores routing.

    `up`, `down` and `gate` are modules of another library with a `weight` and perhaps a `bias`, whose parameters stay
    theirs; `transposed` says that weights lie [in out] (GPT-2). With `weight`, a module with one output, the result is
    multiplied by sigmoid(weight(x)) (Qwen2-MoE's shared expert). `dropout` follows `down` where it is given.
    """

    def __init__(
        self,
        up: nn.Module,
        down: nn.Module,
        activation: Callable[[Tensor], Tensor],
        gate: nn.Module | None = None,
        weight: nn.Module | None = None,
        dropout: nn.Module | None = None,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.gate, self.up, self.down, self.weight, self.dropout = gate, up, down, weight, dropout
        self.activation, self.transposed = activation, transposed

    def forward(self, x: Float[Tensor, "*b d"], routing: Routing | None = None) -> Float[Tensor, "*b d"]:
        hidden = self.activation(self.up(x)) if self.gate is None else self.activation(self.gate(x)) * self.up(x)
        y = self.down(hidden)
        if self.dropout is not None:
            y = self.dropout(y)
        return y if self.weight is None else self.weight(x).sigmoid() * y

    def matrices(self) -> DenseMatrices:
        """The matrices and biases, whichever way they lie."""
        modules = [self.gate, self.up, self.down]
        weights = [None if m is None else m.weight.T if self.transposed else m.weight for m in modules]
        return DenseMatrices(*weights, *(getattr(m, "bias", None) for m in modules))  # type: ignore[arg-type]

    @property
    def width(self) -> int:
        """Hidden units."""
        return len(self.matrices().up)

    def expected_token_flops(self, rows_per_token: float = 1.0) -> float:
        """Forward FLOPs of one token, however many routed experts it meets."""
        return float(self.flops_on(1).useful)

    def flops(self, routing: Routing) -> Cost:
        """Forward FLOPs on every token of `routing`."""
        return self.flops_on(routing.n_tokens)

    def flops_on(self, n_tokens: int) -> Cost:
        """Forward FLOPs on so many tokens."""
        parts = [m for m in (self.gate, self.up, self.down, self.weight) if m is not None]
        return of_products(n_tokens, *(m.weight for m in parts))  # type: ignore[arg-type]

    def kept_per_token(self, d_model: int) -> Kept:
        """What a token leaves for the backward pass."""
        return Kept(self.width * (2.0 if self.gate is None else 4.0))

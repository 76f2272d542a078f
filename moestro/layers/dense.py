"""The dense feed-forward layer."""

from jaxtyping import Bool, Float
from torch import Tensor

from moestro.cost import Cost, Kept
from moestro.experts.dense_mlp import DenseMLP
from moestro.experts.shared import SharedExpert
from moestro.layers.base import Layer
from moestro.routing import Trace


class DenseFFN(Layer):
    """One expert for every token and no router: y = FFN(x). Leaves no traces."""

    def __init__(
        self, d_model: int, width: int, activation: str = "silu", glu: bool = True, bias: bool = False
    ) -> None:
        super().__init__()
        self.expert: SharedExpert | DenseMLP = SharedExpert(d_model, width, activation, glu, bias)

    @classmethod
    def of(cls, expert: SharedExpert | DenseMLP) -> "DenseFFN":
        """The layer that this expert makes."""
        layer = cls.__new__(cls)
        super().__init__(layer)
        layer.expert = expert
        return layer

    def forward(
        self, x: Float[Tensor, "*b d"], keep: Bool[Tensor, "*b"] | None = None
    ) -> tuple[Float[Tensor, "*b d"], tuple[Trace, ...]]:
        return self.expert(x), ()

    def expected_token_flops(self) -> float:
        return self.expert.expected_token_flops()

    def untraced_flops(self, n_tokens: int) -> Cost:
        return self.expert.flops_on(n_tokens)

    def kept_per_token(self, d_model: int) -> Kept:
        return self.expert.kept_per_token(d_model)

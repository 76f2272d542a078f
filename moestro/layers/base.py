"""What a block expects of its feed-forward layer."""

from jaxtyping import Bool, Float
from torch import Tensor, nn

from moestro.routing import Trace


class Layer(nn.Module):
    """x, keep -> y and one trace for every routing that happened; keep=False marks padding."""

    def forward(
        self, x: Float[Tensor, "*b d"], keep: Bool[Tensor, "*b"] | None = None
    ) -> tuple[Float[Tensor, "*b d"], tuple[Trace, ...]]:
        raise NotImplementedError

    def expected_token_flops(self) -> float:
        """Forward FLOPs of a token before anything is learned: equal probabilities for all experts."""
        raise NotImplementedError

    def untraced_flops(self, n_tokens: int) -> float:
        """Forward FLOPs on `n_tokens` tokens that no trace shows."""
        return 0.0

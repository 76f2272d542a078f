"""What a block expects of its feed-forward layer, and layers that never see padding."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moestro.cost import NOTHING, Cost, Kept
from moestro.routing import Trace


class Layer(nn.Module):
    """x, keep -> y and one trace for every routing that happened; keep=False marks padding.

    A block normalises x before the layer and adds y to the residual stream after it, unless the layer `owns_residual`:
    then x is the stream itself and y is what becomes of it. A layer that `follows` others takes one argument more: the
    traces of the layers before it in this forward.
    """

    owns_residual: bool = False
    follows: bool = False

    def forward(
        self, x: Float[Tensor, "*b d"], keep: Bool[Tensor, "*b"] | None = None
    ) -> tuple[Float[Tensor, "*b d"], tuple[Trace, ...]]:
        raise NotImplementedError

    def expected_token_flops(self) -> float:
        """Forward FLOPs of a token before anything is learned: equal probabilities for all experts."""
        raise NotImplementedError

    def kept_per_token(self, d_model: int) -> Kept:
        """What a token of width `d_model` leaves for the backward pass besides itself, all experts equally likely."""
        return Kept.of_flops(self.expected_token_flops(), d_model)

    def untraced_flops(self, n_tokens: int) -> Cost:
        """Forward FLOPs on `n_tokens` tokens that no trace shows."""
        return NOTHING


class TokenLayer(Layer):
    """A layer as a function of tokens, whatever sequences they stand in. Tokens with keep=False (padding) never reach
    `tokens` and get zeros."""

    def tokens(self, x: Float[Tensor, "t d"]) -> tuple[Float[Tensor, "t d"], tuple[Trace, ...]]:
        """y and traces of tokens that all count."""
        raise NotImplementedError

    def forward(
        self, x: Float[Tensor, "*b d"], keep: Bool[Tensor, "*b"] | None = None
    ) -> tuple[Float[Tensor, "*b d"], tuple[Trace, ...]]:
        return self.of_tokens(self.tokens, x, keep)

    def of_tokens(
        self,
        compute: Callable[[Tensor], tuple[Tensor, tuple[Trace, ...]]],
        x: Float[Tensor, "*b d"],
        keep: Bool[Tensor, "*b"] | None,
    ) -> tuple[Float[Tensor, "*b d"], tuple[Trace, ...]]:
        """`compute` on the tokens that count, zeros for the others."""
        flat = x.flatten(0, -2)
        if keep is None:
            y, traces = compute(flat)
            return y.view_as(x), traces
        kept = keep.flatten()
        y, traces = compute(flat[kept])
        index = kept.nonzero().squeeze(-1)
        return torch.zeros_like(flat, dtype=y.dtype).index_copy(0, index, y).view_as(x), traces

    def reindex(self, index: Int[Tensor, "m"]) -> None:
        """Make new expert j the old expert `index[j]`; -1 makes a fresh one."""
        raise NotImplementedError

"""A layer on parts of tokens: each token is projected, split into heads, and put together again."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moestro.cost import Cost, Kept, of_products
from moestro.layers.base import Layer
from moestro.routing import Origin, Trace


class MultiHeadLayer(Layer):
    """y = W_merge concat_j ffn(u_j) + b, where u_j are the `heads` equal parts of W_head x + b: each part of a token is
    a token of its own for `ffn(d_model=...)`, any layer, whose width is d_model / heads (Wu 2024, arXiv:2404.15045,
    Eqs. 3 to 8; Huang 2024, arXiv:2411.16205).

    Equation 6 of the first paper adds u_j to its part's output; its code and the second paper do not (`add_parts`).
    Both projections start xavier-uniform, the first with gain 2^-1/2, as in both papers' code, which skips them for one
    head; here `head` and `merge` say whether they are there. `keep=False` marks padding, whose parts reach no router.

    Figures a token count the parts of a token together: k experts a part are heads * k experts a token.

    Raises: ValueError where heads do not divide d_model.
    """

    def __init__(
        self,
        d_model: int,
        heads: int,
        ffn: Callable[..., Layer],
        head: bool = True,
        merge: bool = True,
        bias: bool = True,
        add_parts: bool = False,
    ) -> None:
        super().__init__()
        if heads < 1 or d_model % heads:
            raise ValueError(f"heads={heads}, allowed: a divisor of d_model={d_model}")
        self.d_model, self.heads, self.add_parts = d_model, heads, add_parts
        self.head = _projection(d_model, bias, 2**-0.5) if head else nn.Identity()
        self.ffn = ffn(d_model=d_model // heads)
        self.merge = _projection(d_model, bias, 1.0) if merge else nn.Identity()
        if merge and bias:
            nn.init.zeros_(self.merge.bias)  # type: ignore[arg-type]

    @property
    def follows(self) -> bool:  # type: ignore[override]
        return self.ffn.follows

    def forward(
        self, x: Float[Tensor, "*b d"], keep: Bool[Tensor, "*b"] | None = None, earlier: tuple[Trace, ...] = ()
    ) -> tuple[Float[Tensor, "*b d"], tuple[Trace, ...]]:
        parts = self.head(x).unflatten(-1, (self.heads, -1))
        kept = None if keep is None else keep[..., None].expand(parts.shape[:-1])
        out, traces = self.ffn(parts, kept, earlier) if self.follows else self.ffn(parts, kept)
        out = out + parts if self.add_parts else out
        y = self.merge(out.flatten(-2))
        if keep is not None:
            y = y.masked_fill(~keep[..., None], 0)
        n_tokens = x[..., 0].numel() if keep is None else int(keep.sum())
        token = torch.arange(n_tokens * self.heads, device=x.device) // self.heads
        return y, tuple(trace.inside(Origin(token, n_tokens)) for trace in traces)

    def reindex(self, index: Int[Tensor, "m"]) -> None:
        """Make new expert j the old expert `index[j]`; -1 makes a fresh one."""
        self.ffn.reindex(index)  # type: ignore[operator]

    def untraced_flops(self, n_tokens: int) -> Cost:
        return self._projection_flops(n_tokens) + self.ffn.untraced_flops(n_tokens * self.heads)

    def expected_token_flops(self) -> float:
        return float(self._projection_flops(1).useful) + self.heads * self.ffn.expected_token_flops()

    def kept_per_token(self, d_model: int) -> Kept:
        """The parts, and what each leaves."""
        return Kept(2.0 * d_model) + self.ffn.kept_per_token(d_model // self.heads) * self.heads

    def _projection_flops(self, n_tokens: int) -> Cost:
        there = (p for p in (self.head, self.merge) if not isinstance(p, nn.Identity))
        return of_products(n_tokens, *(p.weight for p in there))  # type: ignore[arg-type]


def _projection(d_model: int, bias: bool, gain: float) -> nn.Linear:
    linear = nn.Linear(d_model, d_model, bias=bias)
    nn.init.xavier_uniform_(linear.weight, gain)
    return linear

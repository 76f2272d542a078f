"""One decoder block."""

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moestro.cost import Cost, Kept
from moestro.layers.base import Layer
from moestro.model.attention import Attention
from moestro.model.cache import Cache
from moestro.routing import Trace


class Block(nn.Module):
    """x + attention(norm x), then x + ffn(norm x), with RMS norms; `ffn` is any layer of floor 3. One that owns its
    residual is given x and returns what becomes of it."""

    causal = True

    def __init__(self, d_model: int, attention: Attention, ffn: Layer, norm_eps: float = 1e-5) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(d_model, eps=norm_eps)
        self.attention = attention
        self.ffn_norm = nn.Identity() if ffn.owns_residual else nn.RMSNorm(d_model, eps=norm_eps)
        self.ffn = ffn

    def forward(
        self,
        x: Float[Tensor, "b s d"],
        positions: Int[Tensor, "#b s"],
        mask: Bool[Tensor, "b 1 s l"] | None = None,
        keep: Bool[Tensor, "b s"] | None = None,
        cache: Cache | None = None,
        index: int = 0,
        earlier: tuple[Trace, ...] = (),
    ) -> tuple[Float[Tensor, "b s d"], tuple[Trace, ...]]:
        """New residual stream and the traces of the feed-forward layer; `index` is this block's place in the
        cache, `earlier` what the blocks before it left."""
        x = x + self.attention(self.attention_norm(x), positions, mask, cache, index)
        z = self.ffn_norm(x)
        y, traces = self.ffn(z, keep, earlier) if self.ffn.follows else self.ffn(z, keep)
        return (y if self.ffn.owns_residual else x + y), traces

    def flops(self, batch: int, seq_len: int) -> Cost:
        """Forward FLOPs on `batch` sequences, those left out that the traces of this block show."""
        return self.attention.flops(batch, seq_len) + self.ffn.untraced_flops(batch * seq_len)

    def expected_token_flops(self, seq_len: int) -> float:
        """Useful forward FLOPs of a token before anything is learned, in sequences of `seq_len` tokens."""
        return float(self.attention.flops(1, seq_len).useful) / seq_len + self.ffn.expected_token_flops()

    def kept_per_token(self) -> Kept:
        """What a token leaves for the backward pass: what either norm reads, in float32, and what both layers leave."""
        d = self.attention_norm.weight.numel()
        layers = self.attention.kept_per_token(d) + self.ffn.kept_per_token(d)
        return layers + Kept(d, 8.0 * (d + 1))

    def idle_parameters(self) -> float:
        """Mean number of parameters, those of experts left out, that a token does not touch."""
        return 0.0

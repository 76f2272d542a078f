"""Causal self-attention with rotary positions and grouped keys."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moestro.cost import Cost, Kept, of_products
from moestro.model.cache import Cache, attend


class Attention(nn.Module):
    """Grouped-query causal attention (Ainslie 2023, arXiv:2305.13245) with rotary positions (Su 2021,
    arXiv:2104.09864, half-rotation layout), no biases, through scaled_dot_product_attention.

    Raises: ValueError where heads do not divide.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope_theta: float = 10000.0,
    ) -> None:
        super().__init__()
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        if n_heads < 1 or n_kv_heads < 1 or n_heads % n_kv_heads:
            raise ValueError(f"n_heads={n_heads} is not a positive multiple of n_kv_heads={n_kv_heads}")
        if head_dim is None and d_model % n_heads:
            raise ValueError(f"d_model={d_model} is not a multiple of n_heads={n_heads}; give head_dim")
        head_dim = d_model // n_heads if head_dim is None else head_dim
        if head_dim < 2 or head_dim % 2:
            raise ValueError(f"head_dim={head_dim}, allowed: an even number (rotary positions turn pairs)")
        self.n_heads, self.n_kv_heads, self.head_dim, self.rope_theta = (
            n_heads,
            n_kv_heads,
            head_dim,
            rope_theta,
        )
        self.query = nn.Linear(d_model, n_heads * head_dim, bias=False)
        self.key = nn.Linear(d_model, n_kv_heads * head_dim, bias=False)
        self.value = nn.Linear(d_model, n_kv_heads * head_dim, bias=False)
        self.out = nn.Linear(n_heads * head_dim, d_model, bias=False)
        for linear in (self.query, self.key, self.value, self.out):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)

    def forward(
        self,
        x: Float[Tensor, "b s d"],
        positions: Int[Tensor, "#b s"],
        mask: Bool[Tensor, "b 1 s l"] | None = None,
        cache: Cache | None = None,
        block: int = 0,
    ) -> Float[Tensor, "b s d"]:
        """Attend to earlier tokens; `mask` (true = may look) replaces plain causality where it is given."""
        heads = self.query(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
        keys = self.key(x).unflatten(-1, (self.n_kv_heads, -1)).transpose(1, 2)
        values = self.value(x).unflatten(-1, (self.n_kv_heads, -1)).transpose(1, 2)
        cos, sin = self._rotation(positions, heads.dtype)
        heads, keys = _rotate(heads, cos, sin), _rotate(keys, cos, sin)
        if cache is None:
            y = attend(heads, keys, values, mask)
        else:
            y = cache.attend(block, heads, keys, values, mask)
        return self.out(y.transpose(1, 2).flatten(2))

    def _rotation(self, positions: Int[Tensor, "#b s"], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        pair = torch.arange(0, self.head_dim, 2, device=positions.device, dtype=torch.float64)
        angle = positions[..., None].to(torch.float64) * self.rope_theta ** (-pair / self.head_dim)
        angle = torch.cat([angle, angle], dim=-1)[:, None]
        return angle.cos().to(dtype), angle.sin().to(dtype)

    def flops(self, batch: int, seq_len: int) -> Cost:
        """Forward FLOPs on `batch` sequences: projections, and scores and sums of which causality needs (s+1)/2s.

        Where packed documents mask each other less still is needed, equally for every model; that is not subtracted.
        """
        linears = (self.query, self.key, self.value, self.out)
        projections = of_products(batch * seq_len, *(linear.weight for linear in linears))
        square = 4.0 * batch * self.n_heads * self.head_dim * seq_len * seq_len
        return projections + Cost(square * (seq_len + 1) / (2 * seq_len), square)

    def kept_per_token(self, d_model: int) -> Kept:
        """What a token leaves for the backward pass: queries and what is attended to of h heads of width c, keys and
        values of g, and the float32 normaliser of every head. Its input is kept once in float32 and, cast for each of
        three products, three times under autocast: counted as twice."""
        return Kept(2.0 * (d_model + self.head_dim * (self.n_heads + self.n_kv_heads)), 4.0 * self.n_heads)


def _rotate(x: Float[Tensor, "b h s c"], cos: Tensor, sin: Tensor) -> Float[Tensor, "b h s c"]:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin

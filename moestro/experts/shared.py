"""Branches that every token takes."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moestro.cost import NOTHING, Cost, Kept, of_products
from moestro.ops.activations import activation as find
from moestro.routing import Routing


class SharedExpert(nn.Module):
    """FFN(x) = W_out (act(W_gate x) * W_up x), or W_out act(W_up x) without `glu`, on every token; ignores routing.
    With `bias` each of the maps adds one, which starts at 0."""

    def __init__(
        self, d_model: int, width: int, activation: str = "silu", glu: bool = True, bias: bool = False
    ) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width={width}, allowed: at least 1")
        find(activation)
        self.d_model, self.width, self.activation, self.glu = d_model, width, activation, glu
        self.w_in = nn.Linear(d_model, width * (2 if glu else 1), bias=bias)
        self.w_out = nn.Linear(width, d_model, bias=bias)
        for linear, fan_in in ((self.w_in, d_model), (self.w_out, width)):
            nn.init.normal_(linear.weight, std=fan_in**-0.5)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(self, x: Float[Tensor, "*b d"], routing: Routing | None = None) -> Float[Tensor, "*b d"]:
        act = find(self.activation).forward
        hidden = self.w_in(x)
        if self.glu:
            gate, up = hidden.chunk(2, dim=-1)
            return self.w_out(act(gate) * up)
        return self.w_out(act(hidden))

    def expected_token_flops(self, rows_per_token: float = 1.0) -> float:
        """Forward FLOPs of one token, however many routed experts it meets."""
        return 2.0 * self.d_model * self.width * (3 if self.glu else 2)

    def flops(self, routing: Routing) -> Cost:
        """Forward FLOPs on every token of `routing`."""
        return self.flops_on(routing.n_tokens)

    def flops_on(self, n_tokens: int) -> Cost:
        """Forward FLOPs on so many tokens."""
        return of_products(n_tokens, self.w_in.weight, self.w_out.weight)

    def kept_per_token(self, d_model: int) -> Kept:
        """What a token leaves for the backward pass."""
        return Kept(self.width * (4.0 if self.glu else 2.0))


class OutputBias(nn.Module):
    """b on every token, whatever its routing: the output bias of a feed-forward network that was split into experts,
    added once."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(d_model))

    def forward(self, x: Float[Tensor, "*b d"], routing: Routing | None = None) -> Float[Tensor, "*b d"]:
        return self.bias.to(x.dtype).expand_as(x)

    def expected_token_flops(self, rows_per_token: float = 1.0) -> float:
        """None that count: as little as a residual addition."""
        return 0.0

    def flops(self, routing: Routing) -> Cost:
        """None that count."""
        return NOTHING

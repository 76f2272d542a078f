"""A branch that every token takes."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from moestro.cost import Cost
from moestro.ops.activations import activation as find
from moestro.routing import Routing


class SharedExpert(nn.Module):
    """FFN(x) = W_out (act(W_gate x) * W_up x), or W_out act(W_up x) without `glu`, on every token; ignores routing."""

    def __init__(self, d_model: int, width: int, activation: str = "silu", glu: bool = True) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width={width}, allowed: at least 1")
        find(activation)
        self.d_model, self.width, self.activation, self.glu = d_model, width, activation, glu
        self.w_in = nn.Linear(d_model, width * (2 if glu else 1), bias=False)
        self.w_out = nn.Linear(width, d_model, bias=False)
        nn.init.normal_(self.w_in.weight, std=d_model**-0.5)
        nn.init.normal_(self.w_out.weight, std=width**-0.5)

    def forward(self, x: Float[Tensor, "*b d"], routing: Routing | None = None) -> Float[Tensor, "*b d"]:
        act = find(self.activation).forward
        hidden = self.w_in(x)
        if self.glu:
            gate, up = hidden.chunk(2, dim=-1)
            return self.w_out(act(gate) * up)
        return F.linear(act(hidden), self.w_out.weight)

    def expected_token_flops(self, rows_per_token: float = 1.0) -> float:
        """Forward FLOPs of one token, however many routed experts it meets."""
        return 2.0 * self.d_model * self.width * (3 if self.glu else 2)

    def flops(self, routing: Routing) -> Cost:
        """Forward FLOPs on every token of `routing`."""
        return Cost.exact(self.expected_token_flops() * routing.n_tokens)

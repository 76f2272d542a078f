"""A million experts of one neuron each."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from moestro.experts.base import ExpertBank
from moestro.ops import singleton_experts
from moestro.ops.activations import activation as find
from moestro.ops.huge_pages import request_huge_pages
from moestro.routing import Routing, SparseRouting


class SingletonBank(ExpertBank):
    """Experts e_i(x) = act(u_i . x) v_i (He 2024, arXiv:2407.04153, Eq. 6): u and v are rows of two [N, d] tables.

    It is `FFNBank(widths=[1] * N, glu=False)` fetched by id. The paper states no initialisation. Here u has standard
    deviation d^-0.5, so that u . x has variance 1 for x of unit variance; v has `out_std`, by default d^-0.5. Where
    `heads`, `top_k` and `gate` of the router are given, v is scaled so that the layer's output has standard deviation
    `output_std` at the start: Var(y) = G * E[act(z)^2] * out_std^2, with G the sum of a token's squared gates, taken as
    heads / top_k for softmax gates (1 / top_k each) and heads * top_k for sigmoid gates (near 1: the best of many).

    With `sparse_gradients` the tables' gradients hold the rows met and nothing else (`torch.sparse_coo`), so that a
    training step costs what those rows cost, however many experts there are. They need an optimizer for rows:
    `moestro.train` gives them `RowAdamW`.
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        activation: str = "gelu",
        heads: int | None = None,
        top_k: int | None = None,
        gate: Literal["softmax", "sigmoid"] = "softmax",
        output_std: float = 0.6,
        sparse_gradients: bool = False,
    ) -> None:
        super().__init__()
        if n_experts < 1:
            raise ValueError(f"n_experts={n_experts}, allowed: at least 1")
        self.n_experts, self.activation, self.sparse_gradients = n_experts, activation, sparse_gradients
        moment, out_std = find(activation).second_moment, d_model**-0.5
        if heads and top_k:
            squared_gates = heads / top_k if gate == "softmax" else heads * top_k
            out_std = output_std * (squared_gates * moment) ** -0.5
        self.up = nn.Parameter(torch.empty(n_experts, d_model))
        self.down = nn.Parameter(torch.empty(n_experts, d_model))
        # before the first write: that is when pages are made
        for table in (self.up, self.down):
            request_huge_pages(table)
        nn.init.normal_(self.up, std=d_model**-0.5)
        nn.init.normal_(self.down, std=out_std)

    def run(self, z: Float[Tensor, "n d"], offsets: Int[Tensor, "e1"]) -> Float[Tensor, "n d"]:
        expert = torch.repeat_interleave(torch.arange(self.n_experts, device=z.device), offsets.diff())
        act = find(self.activation).forward
        u, v = (F.embedding(expert, table, sparse=self.sparse_gradients) for table in (self.up, self.down))
        return act((z * u).sum(-1, keepdim=True)) * v

    def forward(self, x: Float[Tensor, "t d"], routing: Routing) -> Float[Tensor, "t d"]:
        if not isinstance(routing, SparseRouting) or routing.fixed is None:
            return super().forward(x, routing)
        ids, weight = routing.matrix()
        return singleton_experts(x, ids, weight, self.up, self.down, self.activation, self.sparse_gradients)

    def row_parameters(self) -> tuple[nn.Parameter, ...]:
        return (self.up, self.down) if self.sparse_gradients else ()

    def reindex(self, index: Int[Tensor, "m"]) -> None:
        for name in ("up", "down"):
            table = getattr(self, name).detach()
            rows = table[index.clamp(min=0)]
            fresh = torch.randn_like(rows) * table.std()
            setattr(self, name, nn.Parameter(torch.where((index >= 0)[:, None], rows, fresh)))
        self.n_experts = len(index)

    def row_flops(self) -> float:
        return 4.0 * self.up.shape[1]

    def row_widths(self) -> float:
        return 1.0

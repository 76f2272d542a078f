"""A memory: experts that are plain vectors."""

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from moestro.experts.tables import Gate, TableBank, output_rows_std
from moestro.ops import value_rows
from moestro.routing import Routing, SparseRouting


class ValueBank(TableBank):
    """Experts e_i(x) = v_i, a row of one [N, d] table, whatever x is: the layer's output is the sum of the values met,
    each times its gate (Lample 2019, product-key memories, arXiv:1907.05242; with any router).

    Of N values a product-key memory reads h k rows, where PEER's experts read twice as many. The authors' code starts
    values with standard deviation d^-0.5; where `heads`, `top_k` and `gate` are given, they start as `TableBank` says.
    Width 0, for a value has no hidden unit; 2 d FLOPs a row.
    """

    values: nn.Parameter

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        heads: int | None = None,
        top_k: int | None = None,
        gate: Gate = "softmax",
        output_std: float = 0.6,
        sparse_gradients: bool = False,
    ) -> None:
        super().__init__(n_experts, sparse_gradients)
        std = output_rows_std(d_model, n_experts, 1.0, heads, top_k, gate, output_std)
        self.add_table("values", n_experts, d_model, std)

    def neurons(self) -> dict[str, Tensor]:
        return {"down": self.values}

    def run(self, z: Float[Tensor, "n d"], offsets: Int[Tensor, "e1"]) -> Float[Tensor, "n d"]:
        return F.embedding(self.expert_of_rows(offsets, len(z)), self.values, sparse=self.sparse_gradients).to(z.dtype)

    def forward(self, x: Float[Tensor, "t d"], routing: Routing) -> Float[Tensor, "t d"]:
        if not isinstance(routing, SparseRouting):
            return super().forward(x, routing)
        if routing.fixed is None:
            return self.of_rows(x, routing)
        return value_rows(*routing.matrix(), self.values, self.sparse_gradients)

    def row_flops(self) -> float:
        return 2.0 * self.values.shape[1]

    def row_widths(self) -> float:
        return 0.0

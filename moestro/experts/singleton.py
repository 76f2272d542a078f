"""A million experts of one neuron each."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from moestro.experts.norms import ExpertNorms, activation_remarks
from moestro.experts.tables import Gate, TableBank, output_rows_std
from moestro.ops import singleton_experts
from moestro.ops.activations import activation as find
from moestro.routing import Routing, SparseRouting


class SingletonBank(TableBank):
    """Experts e_i(x) = act(u_i . x) v_i (He 2024, arXiv:2407.04153, Eq. 6): u and v are rows of two [N, d] tables.

    It is `FFNBank(widths=[1] * N, glu=False)` fetched by id. The paper states no initialisation. Here u has standard
    deviation d^-0.5, so that u . x has variance 1 for x of unit variance; v starts as `TableBank` says, with
    E[act(z)^2] for what a gate multiplies.
    """

    up: nn.Parameter
    down: nn.Parameter

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        activation: str = "gelu",
        heads: int | None = None,
        top_k: int | None = None,
        gate: Gate = "softmax",
        output_std: float = 0.6,
        sparse_gradients: bool = False,
    ) -> None:
        super().__init__(n_experts, sparse_gradients)
        self.activation = activation
        moment = find(activation).second_moment
        self.add_table("up", n_experts, d_model, d_model**-0.5)
        out_std = output_rows_std(d_model, n_experts, moment, heads, top_k, gate, output_std)
        self.add_table("down", n_experts, d_model, out_std)

    def run(self, z: Float[Tensor, "n d"], offsets: Int[Tensor, "e1"]) -> Float[Tensor, "n d"]:
        expert = self.expert_of_rows(offsets, len(z))
        rows = {name: F.embedding(expert, t, sparse=self.sparse_gradients) for name, t in self.tables().items()}
        return one_neuron_each(z, rows, self.activation)

    def forward(self, x: Float[Tensor, "t d"], routing: Routing) -> Float[Tensor, "t d"]:
        if not isinstance(routing, SparseRouting):
            return super().forward(x, routing)
        if routing.fixed is None:
            return self.of_rows(x, routing)
        ids, weight = routing.matrix()
        tables = self.tables()
        return singleton_experts(
            x, ids, weight, self.up, self.down, self.activation, self.sparse_gradients, tables.get("gate")
        )

    def norms(self) -> ExpertNorms:
        """Each matrix is one row; a gated neuron's two of the input count as one matrix of their joint norm."""
        inner = [table.detach() for name, table in self.tables().items() if name != "down"]
        rows = torch.cat(inner, dim=1).norm(dim=1), self.tables()["down"].detach().norm(dim=1)
        remarks = activation_remarks(self.activation, glu=len(inner) > 1)
        return ExpertNorms(torch.stack(rows, dim=1), torch.stack(rows, dim=1), remarks)

    def row_flops(self) -> float:
        return 2.0 * len(self.tables()) * self.up.shape[1]

    def row_widths(self) -> float:
        return 1.0


def one_neuron_each(z: Float[Tensor, "n d"], rows: Mapping[str, Float[Tensor, "n d"]], activation: str) -> Tensor:
    """act(u . z) v of every row, [n, d], or act(g . z) (u . z) v, from its neuron's rows `up`, `down` and, gated,
    `gate`."""
    act = find(activation).forward
    hidden = {name: (z * row).sum(-1, keepdim=True) for name, row in rows.items() if name != "down"}
    return (act(hidden["gate"]) * hidden["up"] if "gate" in hidden else act(hidden["up"])) * rows["down"]


class GLUSingletonBank(SingletonBank):
    """Experts e_i(x) = act(g_i . x) (u_i . x) v_i: the gated unit that PEER's paper suggests with a third table and
    does not evaluate (He 2024, arXiv:2407.04153; Shazeer 2020, arXiv:2002.05202).

    It is `FFNBank(widths=[1] * N, glu=True)` fetched by id; g starts like u. A gated neuron has half again the
    parameters and FLOPs of a plain one.
    """

    gate: nn.Parameter

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        activation: str = "silu",
        heads: int | None = None,
        top_k: int | None = None,
        gate: Gate = "softmax",
        output_std: float = 0.6,
        sparse_gradients: bool = False,
    ) -> None:
        super().__init__(d_model, n_experts, activation, heads, top_k, gate, output_std, sparse_gradients)
        self.add_table("gate", n_experts, d_model, d_model**-0.5)

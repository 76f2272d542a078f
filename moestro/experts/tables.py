"""`TableBank`: experts whose weights are rows of tables, fetched by id."""

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moestro.cost import Kept
from moestro.experts.base import ExpertBank
from moestro.ops.met_rows import Columns, Met, met_experts
from moestro.ops.reindexed import normal_like, reindexed
from moestro.ops.tables import new_table
from moestro.routing import SparseRouting

Gate = Literal["softmax", "sigmoid", "relu"]
# Of a product key's score at the start: queries of unit variance, keys uniform as `ProductKeyRouter` draws them.
_SCORE_VARIANCE = 2 / 3


class TableBank(ExpertBank):
    """One row of each of the tables [n_experts, d_model] for every expert.

    Where `heads`, `top_k` and `gate` of the router are given, the rows that are summed into the output start with the
    standard deviation that gives it `output_std`, as `output_rows_std` computes it; else with d_model^-0.5.

    With `sparse_gradients` the tables' gradients hold the rows met and nothing else (`torch.sparse_coo`), so that a
    training step costs what those rows cost, however many experts there are. They need an optimizer for rows:
    `moestro.train` gives them `RowAdamW`.
    """

    activation = "none"

    def __init__(self, n_experts: int, sparse_gradients: bool) -> None:
        super().__init__()
        if n_experts < 1:
            raise ValueError(f"n_experts={n_experts}, allowed: at least 1")
        self.n_experts, self.sparse_gradients = n_experts, sparse_gradients

    def add_table(self, name: str, n_rows: int, d_model: int, std: float) -> None:
        """A table of normal rows under `name`."""
        table = nn.Parameter(new_table(n_rows, d_model))
        nn.init.normal_(table, std=std)
        setattr(self, name, table)

    def tables(self) -> dict[str, Tensor]:
        """The tables by name."""
        return dict(self.named_parameters(recurse=False))

    def neurons(self) -> dict[str, Tensor]:
        """The tables by their part in an expert: what is summed is `down`, what meets tokens `up` and `gate`."""
        return self.tables()

    def met(self, routing: SparseRouting) -> tuple[Met, Float[Tensor, "n"]]:
        """The rows of the tables that each token meets, token after token, and the gate of each."""
        token, order = routing.token.sort(stable=True)
        return Met(token, routing.expert[order], routing.n_tokens), routing.weight[order]

    def of_rows(
        self, x: Float[Tensor, "t d"], routing: SparseRouting, columns: Columns | None = None
    ) -> Float[Tensor, "t d"]:
        """`forward` where tokens meet any numbers of experts, or where the tables hold only some `columns`."""
        met, weight = self.met(routing)
        return met_experts(x, met, weight, self.neurons(), self.activation, self.sparse_gradients, columns)

    @torch.no_grad()
    def keep(self, first: int, end: int) -> None:
        """Make experts `first` to `end` - 1 the only ones; the parameters stay the same objects."""
        self._cut(slice(first, end), slice(None))
        self.n_experts = end - first

    @torch.no_grad()
    def keep_columns(self, first: int, end: int) -> None:
        """Make columns `first` to `end` - 1 the only ones of every table."""
        self._cut(slice(None), slice(first, end))

    def _cut(self, rows: slice, columns: slice) -> None:
        for table in self.parameters(recurse=False):
            part = table.data[rows, columns]
            n_rows, width = part.shape
            table.data = new_table(n_rows, width, table.dtype, table.device).copy_(part)

    def row_parameters(self) -> tuple[nn.Parameter, ...]:
        return tuple(self.parameters(recurse=False)) if self.sparse_gradients else ()

    def weights_of(self, expert: int) -> tuple[tuple[nn.Parameter, slice], ...]:
        return tuple((table, slice(expert, expert + 1)) for table in self.parameters(recurse=False))

    def kept_per_token(self, rows_per_token: float, d_model: int) -> Kept:
        """Products with the rows of every table; no row is kept."""
        return Kept(rows_per_token * len(self.tables()))

    def reindex(self, index: Int[Tensor, "m"]) -> None:
        for name, table in self.tables().items():
            fresh = normal_like(table, len(index)) * table.detach().std()
            setattr(self, name, nn.Parameter(reindexed(table, index, fresh)))
        self.n_experts = len(index)


def output_rows_std(
    d_model: int,
    n_experts: int,
    hidden_moment: float,
    heads: int | None,
    top_k: int | None,
    gate: Gate,
    output_std: float,
) -> float:
    """Standard deviation of the rows that are summed into the output, such that the output starts with `output_std`:
    Var(y) = G * hidden_moment * std^2, where G is the sum of a token's squared gates at the start and `hidden_moment`
    the second moment of what a row is multiplied by besides its gate. Without `heads` or `top_k`: d_model^-0.5.
    """
    for name, value in (("heads", heads), ("top_k", top_k)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}, allowed: at least 1")
    if heads is None or top_k is None:
        return d_model**-0.5
    return output_std * (heads * squared_gates(gate, top_k, n_experts) * hidden_moment) ** -0.5


def squared_gates(gate: Gate, top_k: int, n_experts: int) -> float:
    """Sum of one head's squared gates at the start, for product keys: 1 / top_k for softmax gates (1 / top_k each);
    top_k for sigmoid gates (near 1: the best of many); for ReLU gates that of the top_k largest of n_experts normal
    scores of variance 2/3, top_k * 2/3 * (1 + z phi(z) / q) with q = top_k / n_experts the probability above z."""
    if gate == "softmax":
        return 1 / top_k
    if gate == "sigmoid":
        return float(top_k)
    q = min(0.5, top_k / n_experts)
    z = -float(torch.special.ndtri(torch.tensor(q, dtype=torch.float64, device="cpu")))
    density = math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    return top_k * _SCORE_VARIANCE * (1 + z * density / q)

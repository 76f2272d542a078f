"""Many small experts of several widths in one pool."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moestro.cost import Cost
from moestro.experts.tables import Gate, TableBank, output_rows_std
from moestro.ops import ragged_experts, reference
from moestro.ops.activations import activation as find
from moestro.ops.met_rows import Met
from moestro.ops.ragged import neurons_met
from moestro.routing import Routing, SparseRouting


class RaggedBank(TableBank):
    """Experts e_i(x) = sum over its widths[i] neurons j of act(u_ij . x) v_ij: PEER's experts where some have one
    neuron, some two, some four (ours; with all widths 1 it is `SingletonBank`, and it is always
    `FFNBank(widths, glu=False)` fetched by id).

    Unit-major: u and v are rows of two [sum(widths), d] tables in which expert i owns the rows
    starts[i], ..., starts[i + 1] - 1. Behind product keys expert i*n + j belongs to sub-key i, so that experts of one
    width that follow one another have first sub-keys of their own, and a sum of two scores can prefer a width. u has
    standard deviation d^-0.5; v of an expert of width w starts as `TableBank` says, times w^-0.5: experts of all widths
    start with outputs of one scale.
    """

    up: nn.Parameter
    down: nn.Parameter
    starts: Tensor

    def __init__(
        self,
        d_model: int,
        widths: Sequence[int],
        activation: str = "gelu",
        heads: int | None = None,
        top_k: int | None = None,
        gate: Gate = "softmax",
        output_std: float = 0.6,
        sparse_gradients: bool = False,
    ) -> None:
        super().__init__(len(widths), sparse_gradients)
        if min(widths) < 1:
            raise ValueError(f"widths={list(widths)[:8]}... has {min(widths)}, allowed: at least 1 neuron an expert")
        self.activation = activation
        moment = find(activation).second_moment
        self.out_std = output_rows_std(d_model, self.n_experts, moment, heads, top_k, gate, output_std)
        # sizes stay countable while the weights are on the meta device
        each = torch.tensor(widths, dtype=torch.int64, device="cpu")
        self.register_buffer("starts", _starts(each), persistent=False)
        self.add_table("up", sum(widths), d_model, d_model**-0.5)
        self.add_table("down", sum(widths), d_model, self.out_std)
        with torch.no_grad():
            self.down.mul_(_by_width(each).to(self.down))

    @property
    def widths(self) -> Int[Tensor, "e"]:
        """Neurons of every expert."""
        return self.starts.diff()

    def met(self, routing: SparseRouting) -> tuple[Met, Float[Tensor, "n"]]:
        experts, weight = super().met(routing)
        met, pair = neurons_met(experts, self.starts)
        return met, weight[pair]

    @torch.no_grad()
    def keep(self, first: int, end: int) -> None:
        bounds = self.starts[first : end + 1]
        self._cut(slice(int(bounds[0]), int(bounds[-1])), slice(None))
        self.n_experts, self.starts = end - first, bounds - bounds[0]

    def run(self, z: Float[Tensor, "n d"], offsets: Int[Tensor, "e1"]) -> Float[Tensor, "n d"]:
        ids, one = self.expert_of_rows(offsets, len(z))[:, None], torch.ones_like(z[:, :1])
        return reference.ragged_experts(
            z, ids, one, self.starts, self.up, self.down, self.activation, self.sparse_gradients
        )  # fmt: skip

    def forward(self, x: Float[Tensor, "t d"], routing: Routing) -> Float[Tensor, "t d"]:
        if not isinstance(routing, SparseRouting):
            return super().forward(x, routing)
        if routing.fixed is None:
            return self.of_rows(x, routing)
        ids, weight = routing.matrix()
        return ragged_experts(
            x, ids, weight, self.starts, self.up, self.down, self.activation, self.sparse_gradients
        )  # fmt: skip

    def weights_of(self, expert: int) -> tuple[tuple[nn.Parameter, slice], ...]:
        first, end = self.starts[expert : expert + 2].tolist()
        return tuple((table, slice(first, end)) for table in (self.up, self.down))

    def reindex(self, index: Int[Tensor, "m"]) -> None:
        """Move experts; a fresh one (-1) takes the width its position had, or the last expert's beyond the end."""
        last, old = self.n_experts - 1, self.starts
        source = torch.where(index >= 0, index, torch.arange(len(index), device=index.device).clamp(max=last))
        widths = self.widths[source]
        expert = torch.arange(len(index), device=index.device).repeat_interleave(widths)
        self.n_experts, self.starts = len(index), _starts(widths)
        place = torch.arange(len(expert), device=index.device) - self.starts[expert]
        row, kept = old[source[expert]] + place, (index >= 0)[expert, None]
        scales = {"up": self.up.shape[1] ** -0.5, "down": self.out_std * _by_width(widths)}
        for name, table in self.tables().items():
            rows = table.detach()[row]
            fresh = torch.randn_like(rows) * torch.as_tensor(scales[name]).to(rows)
            setattr(self, name, nn.Parameter(torch.where(kept, rows, fresh)))

    def row_flops(self) -> Float[Tensor, "e"]:
        return self.row_widths() * (4.0 * self.up.shape[1])

    def row_widths(self) -> Float[Tensor, "e"]:
        return self.widths.double()

    def flops(self, routing: Routing) -> Cost:
        """As in every bank, but from the rows: nothing is counted for each of a million experts."""
        if not isinstance(routing, SparseRouting):
            return super().flops(routing)
        return Cost.exact(self.row_widths()[routing.expert].sum() * (4.0 * self.up.shape[1]))


def _starts(widths: Int[Tensor, "e"]) -> Int[Tensor, "e1"]:
    return torch.cat([widths.new_zeros(1), widths.cumsum(0)])


def _by_width(widths: Int[Tensor, "e"]) -> Float[Tensor, "n 1"]:
    """width^-0.5 of the expert of every neuron."""
    return (widths.double() ** -0.5).repeat_interleave(widths)[:, None]

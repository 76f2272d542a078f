"""Feed-forward experts, however their matrices are stored, and those of any widths."""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moestro.cost import Kept
from moestro.experts.base import ExpertBank, real_device
from moestro.experts.linears import ConcatLinear, ExpertLinear
from moestro.experts.norms import ExpertNorms, activation_remarks, norms_of
from moestro.ops import expert_ffn, few_rows_ffn, skips_sorting
from moestro.ops.activations import activation as find
from moestro.routing import Routing, SparseRouting


class FFNExperts(ExpertBank):
    """Experts FFN_e(x) = W_out,e (act(W_gate,e x) * W_up,e x), or W_out,e act(W_up,e x) without `glu`, no biases,
    however `w_in` and `w_out` store their matrices."""

    w_in: ExpertLinear
    w_out: ExpertLinear

    def __init__(self, w_in: ExpertLinear, w_out: ExpertLinear, activation: str, glu: bool) -> None:
        super().__init__()
        find(activation)
        self.activation, self.glu = activation, glu
        self.w_in, self.w_out = w_in, w_out

    @property
    def widths(self) -> tuple[int, ...]:
        """Hidden size of every expert."""
        return self.w_out.widths

    @property
    def n_experts(self) -> int:  # type: ignore[override]
        return len(self.widths)

    def run(self, z: Float[Tensor, "n d"], offsets: Int[Tensor, "e1"]) -> Float[Tensor, "n d"]:
        return self.outputs(self.w_in(z.split(offsets.diff().tolist())))

    def outputs(self, hidden: Sequence[Float[Tensor, "_ _"]]) -> Float[Tensor, "n d"]:
        """Of every expert's rows, from what its first map made of them."""
        act = find(self.activation).forward
        if self.glu:
            hidden = [act(h[:, :width]) * h[:, width:] for h, width in zip(hidden, self.widths, strict=True)]
        else:
            hidden = [act(h) for h in hidden]
        return torch.cat(self.w_out(hidden))

    def forward(self, x: Float[Tensor, "t d"], routing: Routing) -> Float[Tensor, "t d"]:
        if not isinstance(routing, SparseRouting):
            return super().forward(x, routing)
        weights = self.w_in.weight, self.w_out.weight
        if skips_sorting(routing.n_rows, len(x), self.n_experts, x, routing.weight, *weights):
            r = routing
            return few_rows_ffn(x, r.token, r.expert, r.weight, *weights, self.widths, self.activation)
        r = routing.grouped()
        return expert_ffn(x, r.token, r.weight, r.offsets, *weights, self.widths, self.activation)

    def reindex(self, index: Int[Tensor, "m"]) -> None:
        """Move experts; a fresh one (-1) takes the width its position had, or the last expert's beyond the end."""
        old = self.widths
        widths = [old[e] if e >= 0 else old[min(j, len(old) - 1)] for j, e in enumerate(index.tolist())]
        self.w_in.reindex(index, widths)
        self.w_out.reindex(index, widths)

    def weights_of(self, expert: int) -> tuple[tuple[nn.Parameter, slice], ...]:
        return (*self.w_in.weights_of(expert), *self.w_out.weights_of(expert))

    def norms(self) -> ExpertNorms:
        pairs = zip(self.w_in.matrices(), self.w_out.matrices(), strict=True)
        return norms_of(list(pairs), activation_remarks(self.activation, self.glu))

    def row_flops(self) -> Float[Tensor, "e"]:
        return self.row_widths() * (2.0 * self.w_out.d_model * (3 if self.glu else 2))

    def kept_per_token(self, rows_per_token: float, d_model: int) -> Kept:
        """Hidden units before their activation, and nothing else of a row."""
        return Kept(rows_per_token * sum(self.widths) / self.n_experts * (2 if self.glu else 1))

    def row_widths(self) -> Float[Tensor, "e"]:
        device = next(self.parameters()).device
        return torch.tensor(self.widths, dtype=torch.float64, device=real_device(device))


class FFNBank(FFNExperts):
    """Feed-forward experts of any widths in one parameter for each projection.

    `widths[e]` is the hidden size of expert e (Wang 2024, arXiv:2408.10681, Eq. 1 with its own h_e for each expert);
    equal widths are the ordinary mixture of experts, width 0 is the zero expert. Parameters: 3 d sum(widths), or
    2 d sum(widths) without `glu`.
    """

    w_in: ConcatLinear
    w_out: ConcatLinear

    def __init__(
        self,
        d_model: int,
        widths: Sequence[int],
        activation: str = "silu",
        glu: bool = True,
        out_init: Literal["per_width", "shared"] = "per_width",
    ) -> None:
        if not widths or any(width < 0 for width in widths):
            raise ValueError(f"widths={list(widths)}, allowed: at least one width, none negative")
        w_in = ConcatLinear(d_model, widths, side="in", blocks=2 if glu else 1)
        super().__init__(w_in, ConcatLinear(d_model, widths, side="out", init=out_init), activation, glu)

"""`BiasedFFNBank`: feed-forward experts whose hidden units have biases."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moestro.experts.base import ExpertBank
from moestro.experts.ffn import FFNBank
from moestro.experts.norms import ExpertNorms


class BiasedFFNBank(ExpertBank):
    """Experts W_out,e (act(W_gate,e x + b_gate,e) * (W_up,e x + b_up,e)), or W_out,e act(W_up,e x + b_up,e) without
    `glu`: an `FFNBank` with one bias for every row of its first map, in the same order, which start at 0.

    Experts of a split network have no output biases of their own: theirs is one for all (`OutputBias`), added once
    however many experts a token meets. Computes by the definition; the compiled operations know no biases.
    """

    ffn: FFNBank

    def __init__(self, d_model: int, widths: Sequence[int], activation: str = "silu", glu: bool = True) -> None:
        super().__init__()
        self.ffn = FFNBank(d_model, widths, activation, glu)
        self.bias = nn.Parameter(torch.zeros(len(self.ffn.w_in.weight)))

    @property
    def n_experts(self) -> int:  # type: ignore[override]
        return self.ffn.n_experts

    @property
    def widths(self) -> tuple[int, ...]:
        """Hidden size of every expert."""
        return self.ffn.widths

    def run(self, z: Float[Tensor, "n d"], offsets: Int[Tensor, "e1"]) -> Float[Tensor, "n d"]:
        hidden = self.ffn.w_in(z.split(offsets.diff().tolist()))
        return self.ffn.outputs([h + b.to(h.dtype) for h, b in zip(hidden, self._biases(), strict=True)])

    def _biases(self) -> tuple[Tensor, ...]:
        return self.bias.split([self.ffn.w_in.blocks * width for width in self.widths])

    def reindex(self, index: Int[Tensor, "m"]) -> None:
        """As `FFNBank`; a fresh expert's biases are 0."""
        old = [bias.detach() for bias in self._biases()]
        self.ffn.reindex(index)
        blocks = self.ffn.w_in.blocks
        fresh = [self.bias.new_zeros(blocks * width) for width in self.widths]
        self.bias = nn.Parameter(torch.cat([fresh[j] if e < 0 else old[e] for j, e in enumerate(index.tolist())]))

    def weights_of(self, expert: int) -> tuple[tuple[nn.Parameter, slice], ...]:
        return (*self.ffn.weights_of(expert), (self.bias, self.ffn.w_in.rows_of(expert)))

    def norms(self) -> ExpertNorms:
        plain = self.ffn.norms()
        return ExpertNorms(plain.frobenius, plain.spectral, (*plain.heuristic, "biases are left out"))

    def row_flops(self) -> Float[Tensor, "e"]:
        return self.ffn.row_flops()

    def own_parameters(self) -> Float[Tensor, "e"]:
        return self.row_flops() / 2 + self.ffn.w_in.blocks * self.row_widths()

    def row_widths(self) -> Float[Tensor, "e"]:
        return self.ffn.row_widths()

"""`BankSlice`: some experts of a bank whose weights belong to another layer."""

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moestro.cost import Cost
from moestro.experts.base import ExpertBank
from moestro.experts.norms import ExpertNorms
from moestro.routing import Routing, SparseRouting


class BankSlice(ExpertBank):
    """Experts `first`, `first + 1`, ... of `bank`, numbered from 0: several routers may each see a part of one bank.

    The weights stay those of the bank and are no parameters of the slice. Experts cannot be moved from here.

    Raises: ValueError where no expert is left.
    """

    def __init__(self, bank: ExpertBank, first: int) -> None:
        super().__init__()
        if not 0 <= first < bank.n_experts:
            raise ValueError(f"first={first}, allowed: 0 to {bank.n_experts - 1}")
        # in a tuple, so that the weights are not registered a second time
        self._whole, self.first = (bank,), first

    @property
    def n_experts(self) -> int:  # type: ignore[override]
        return self._whole[0].n_experts - self.first

    def owner(self) -> tuple[ExpertBank, int]:
        owner, first = self._whole[0].owner()
        return owner, first + self.first

    @property
    def shown(self) -> ExpertBank:
        """The bank of which these are some experts."""
        return self._whole[0]

    def show(self, bank: ExpertBank) -> None:
        """Show the experts of `bank`, as many as before, from now on."""
        self._whole = (bank,)

    def run(self, z: Float[Tensor, "n d"], offsets: Int[Tensor, "e1"]) -> Float[Tensor, "n o"]:
        return self._whole[0].run(z, self._padded(offsets))

    def forward(self, x: Float[Tensor, "t d"], routing: Routing) -> Float[Tensor, "t o"]:
        if not isinstance(routing, SparseRouting):
            return super().forward(x, routing)
        return self._whole[0](x, self._theirs(routing))

    def _theirs(self, routing: SparseRouting) -> SparseRouting:
        """The same rows under the bank's own numbers."""
        return replace(
            routing,
            expert=routing.expert + self.first,
            n_experts=self._whole[0].n_experts,
            logits=None,
            bounds=None if routing.bounds is None else self._padded(routing.bounds),
        )

    def _padded(self, offsets: Int[Tensor, "e1"]) -> Int[Tensor, "e1"]:
        """The same rows, none of them for the experts before this slice."""
        return torch.cat([offsets.new_zeros(self.first), offsets])

    def weights_of(self, expert: int) -> tuple[tuple[nn.Parameter, slice], ...]:
        return self._whole[0].weights_of(self.first + expert)

    def norms(self) -> ExpertNorms | None:
        whole = self._whole[0].norms()
        if whole is None:
            return None
        return replace(whole, frobenius=whole.frobenius[self.first :], spectral=whole.spectral[self.first :])

    def reindex(self, index: Int[Tensor, "m"]) -> None:
        raise ValueError("these experts are shared by several routers: reindex the layer that owns them")

    def flops(self, routing: Routing) -> Cost:
        """What the bank counts for these rows, work for all of them together included."""
        whole = self._whole[0]
        cost = whole.flops(self._theirs(routing)) if isinstance(routing, SparseRouting) else super().flops(routing)
        return cost.of_weights(whole.parameters())

    def expected_token_flops(self, rows_per_token: float) -> float:
        each = isinstance(self.row_flops(), Tensor)
        return (super() if each else self._whole[0]).expected_token_flops(rows_per_token)

    def row_flops(self) -> Float[Tensor, "e"] | float:
        return self._mine(self._whole[0].row_flops())

    def own_parameters(self) -> Float[Tensor, "e"] | float:
        return self._mine(self._whole[0].own_parameters())

    def shared_parameters(self) -> float:
        return self._whole[0].shared_parameters()

    def row_widths(self) -> Float[Tensor, "e"] | float:
        return self._mine(self._whole[0].row_widths())

    def _mine(self, value: Tensor | float) -> Tensor | float:
        return value[self.first :] if isinstance(value, Tensor) else value

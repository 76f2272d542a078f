"""`BankSlice`: some experts of a bank whose weights belong to another layer."""

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

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
        bank, bounds = self._whole[0], routing.bounds
        return bank(
            x,
            replace(
                routing,
                expert=routing.expert + self.first,
                n_experts=bank.n_experts,
                logits=None,
                bounds=None if bounds is None else self._padded(bounds),
            ),
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

"""`SpreadBank`: a bank whose weights several ranks hold together, each its own part."""

import copy
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moestro.cost import Cost, Kept
from moestro.experts import ExpertBank
from moestro.parallel.exchange import Arrival
from moestro.parallel.layout import Layout, lay_out
from moestro.routing import Routing, SparseRouting


class SpreadBank(ExpertBank):
    """Every rank calls it with its own tokens and their routing and gets their outputs, as if it held the whole bank.

    Gradients are those of the sum of all ranks' losses: no rank has to add anything to those of its part. Parameters
    keep the names that they have in one process, and `layout` says where each lies in the whole one.
    """

    def __init__(self, bank: ExpertBank) -> None:
        super().__init__()
        # in tuples, so that neither is registered as a part: `hold` gives this bank the parts of its rank's own
        self._whole, self._own = (on_meta(bank),), (bank,)

    def hold(self, own: ExpertBank) -> None:
        """From now on `own` computes this rank's part."""
        self._own = (own,)
        # the very dicts: parameters keep their names, and what moves or replaces them does so in both
        self._parameters, self._modules, self._buffers = own._parameters, own._modules, own._buffers
        self._non_persistent_buffers_set = own._non_persistent_buffers_set
        for name, parameter in own.named_parameters():
            lay_out(parameter, self.layout(name))

    def layout(self, name: str) -> Layout:
        """Where this rank's part of the parameter `name` lies in the whole one."""
        raise NotImplementedError

    @property
    def whole(self) -> ExpertBank:
        """The bank in one process, its weights on the device meta: names, shapes and sizes of all experts."""
        return self._whole[0]

    def blank(self) -> ExpertBank:
        """The bank in one process, here and with weights that are not set."""
        return copy.deepcopy(self.whole).to_empty(device=next(self.parameters()).device)

    @property
    def own(self) -> ExpertBank:
        """The bank of this rank's part."""
        return self._own[0]

    @property
    def n_experts(self) -> int:  # type: ignore[override]
        return self.whole.n_experts

    def train(self, mode: bool = True) -> "SpreadBank":
        self.own.train(mode)
        return super().train(mode)  # type: ignore[return-value]

    def run(self, z: Float[Tensor, "n d"], offsets: Int[Tensor, "e1"]) -> Float[Tensor, "n o"]:
        row = torch.arange(len(z), device=z.device)
        expert = torch.arange(self.n_experts, device=z.device).repeat_interleave(offsets.diff(), output_size=len(z))
        return self.sent(z, SparseRouting(row, expert, z.new_ones(len(z)), len(z), self.n_experts))()

    def forward(self, x: Float[Tensor, "t d"], routing: Routing) -> Float[Tensor, "t o"]:
        return self.begin(x, routing)()

    def begin(self, x: Float[Tensor, "t d"], routing: Routing) -> Arrival:
        if isinstance(routing, SparseRouting):
            return self.sent(x, routing)
        y = super().forward(x, routing)
        return lambda: y

    def sent(self, x: Float[Tensor, "t d"], routing: SparseRouting) -> Arrival:
        """Send what other ranks need of these tokens; the call that is returned waits for theirs, computes this rank's
        part and returns what all ranks' made of this rank's tokens."""
        raise NotImplementedError

    def weights_of(self, expert: int) -> tuple[tuple[nn.Parameter, slice], ...]:
        """This rank's parameters, and the rows of the whole ones that are the expert's."""
        named = {id(parameter): name for name, parameter in self.whole.named_parameters()}
        return tuple((self.get_parameter(named[id(p)]), rows) for p, rows in self.whole.weights_of(expert))

    def row_parameters(self) -> tuple[Tensor, ...]:
        return self.own.row_parameters()

    def reindex(self, index: Int[Tensor, "m"]) -> None:
        """Raises: ValueError, for experts are renumbered before they are spread over ranks."""
        raise ValueError("experts that are spread over ranks cannot be reindexed")

    def n_parameters(self) -> int:
        return self.whole.n_parameters()

    def own_parameters(self) -> Float[Tensor, "e"] | float:
        return self._here(self.whole.own_parameters())

    def row_flops(self) -> Float[Tensor, "e"] | float:
        return self._here(self.whole.row_flops())

    def row_widths(self) -> Float[Tensor, "e"] | float:
        return self._here(self.whole.row_widths())

    def flops(self, routing: Routing) -> Cost:
        each = self.row_flops()
        if isinstance(each, Tensor) and isinstance(routing, SparseRouting):
            return Cost.exact(each[routing.expert].sum())
        return super().flops(routing)

    def kept_per_token(self, rows_per_token: float, d_model: int) -> Kept:
        return self.whole.kept_per_token(rows_per_token, d_model)

    def _here(self, value: Tensor | float) -> Tensor | float:
        return value.to(next(self.parameters()).device) if isinstance(value, Tensor) else value


def on_meta(bank: ExpertBank) -> Any:
    """A copy without numbers: the weights are on the device meta, and none is copied on the way."""
    without: dict[int, Any] = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        for parameter in bank.parameters()
    }
    return copy.deepcopy(bank, without)

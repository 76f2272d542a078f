"""A mixture-of-experts layer: router + branches, nothing else."""

from collections.abc import Collection, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moestro.cost import NOTHING, Cost
from moestro.experts.base import ExpertBank
from moestro.experts.shared import SharedExpert
from moestro.routers.base import Router
from moestro.routing import Routing, Trace

RECORDABLE = frozenset({"rows"})


class MoELayer(nn.Module):
    """y = sum over branches of branch(x, routing), routing = router(x).

    A branch is anything called so: an `ExpertBank`, a shared expert that ignores the routing, ... Tokens with
    keep=False (padding) never reach the router or an expert and get zeros. `record={"rows"}` keeps the experts' outputs
    before they are combined in the trace (through the definition, not the fast path).

    Raises: ValueError where router and banks disagree about the number of experts.
    """

    def __init__(self, router: Router, branches: Sequence[nn.Module], record: Collection[str] = ()) -> None:
        super().__init__()
        banks = [branch for branch in branches if isinstance(branch, ExpertBank)]
        if not banks:
            raise ValueError(
                f"branches={[type(b).__name__ for b in branches]}, allowed: at least one bank of experts"
            )
        for bank in banks:
            if bank.n_experts != router.n_experts:
                raise ValueError(
                    f"the router knows {router.n_experts} experts, {type(bank).__name__} {bank.n_experts}"
                )
        if unknown := set(record) - RECORDABLE:
            raise ValueError(f"record={sorted(unknown)}, allowed: {sorted(RECORDABLE)}")
        self.router, self.branches, self.record = router, nn.ModuleList(branches), frozenset(record)

    @property
    def bank(self) -> ExpertBank:
        """The first bank of experts."""
        return next(branch for branch in self.branches if isinstance(branch, ExpertBank))

    def forward(
        self, x: Float[Tensor, "*b d"], keep: Bool[Tensor, "*b"] | None = None
    ) -> tuple[Float[Tensor, "*b d"], tuple[Trace, ...]]:
        flat = x.flatten(0, -2)
        if keep is None:
            y, trace = self._tokens(flat)
            return y.view_as(x), (trace,)
        kept = keep.flatten()
        y, trace = self._tokens(flat[kept])
        index = kept.nonzero().squeeze(-1)
        return torch.zeros_like(flat, dtype=y.dtype).index_copy(0, index, y).view_as(x), (trace,)

    def _tokens(self, x: Float[Tensor, "t d"]) -> tuple[Float[Tensor, "t d"], Trace]:
        routing = self.router(x)
        y, rows = None, None
        for branch in self.branches:
            if "rows" in self.record and branch is self.bank:
                routing = routing.grouped()
                rows = branch.run(routing.gather(x), routing.offsets)
                out = routing.combine(rows)
            else:
                out = branch(x, routing)
            y = out if y is None else y + out
        return y, Trace(self, x, routing, rows)

    def reindex(self, index: Int[Tensor, "m"]) -> None:
        """Make new expert j the old expert `index[j]`, in the router and every bank; -1 makes a fresh one."""
        self.router.reindex(index)
        for branch in self.branches:
            if isinstance(branch, ExpertBank):
                branch.reindex(index)

    def expert_widths(self) -> Float[Tensor, "e"] | float:
        """Hidden units of every expert of the first bank, or one number where all are equal."""
        return self.bank.row_widths()

    def flops(self, routing: Routing) -> Cost:
        """Forward FLOPs that `routing` shows were used: router, experts and shared branches."""
        branches = sum((branch.flops(routing) for branch in self.branches), NOTHING)
        return branches + Cost.exact(self.router.flops(routing.n_tokens))

    def expected_token_flops(self) -> float:
        """Forward FLOPs of a token before anything is learned: equal probabilities for all experts."""
        total = self.router.flops(1)
        for branch in self.branches:
            if isinstance(branch, ExpertBank):
                total += branch.mean_row_flops() * self.router.rows_per_token()
            elif isinstance(branch, SharedExpert):
                total += branch.token_flops()
            else:
                raise ValueError(f"{type(branch).__name__} does not say what a token costs")
        return total

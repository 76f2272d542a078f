"""A mixture-of-experts layer: router + branches, nothing else."""

from collections.abc import Collection, Sequence
from functools import partial, reduce

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moestro.cost import NOTHING, Cost
from moestro.experts.base import ExpertBank
from moestro.experts.shared import SharedExpert
from moestro.layers.base import TokenLayer
from moestro.routers.base import Router
from moestro.routing import Routing, Trace

RECORDABLE = frozenset({"rows"})


class MoELayer(TokenLayer):
    """y = sum over branches of branch(x, routing), routing = router(x), or router(x, routing of the layer before) where
    the router `follows`.

    A branch is anything called so: an `ExpertBank`, a shared expert that ignores the routing, ... `record={"rows"}`
    keeps the experts' outputs before they are combined in the trace (through the definition, not the fast path).

    Raises: ValueError where router and banks disagree about the number of experts.
    """

    def __init__(self, router: Router, branches: Sequence[nn.Module], record: Collection[str] = ()) -> None:
        super().__init__()
        banks = [branch for branch in branches if isinstance(branch, ExpertBank)]
        if not banks:
            raise ValueError(f"branches={[type(b).__name__ for b in branches]}, allowed: at least one bank of experts")
        for bank in banks:
            if bank.n_experts != router.n_experts:
                raise ValueError(f"the router knows {router.n_experts} experts, {type(bank).__name__} {bank.n_experts}")
        if unknown := set(record) - RECORDABLE:
            raise ValueError(f"record={sorted(unknown)}, allowed: {sorted(RECORDABLE)}")
        self.router, self.branches, self.record = router, nn.ModuleList(branches), frozenset(record)

    @property
    def bank(self) -> ExpertBank:
        """The first bank of experts."""
        return self.banks()[0]

    def banks(self) -> list[ExpertBank]:
        """All banks of experts."""
        return [branch for branch in self.branches if isinstance(branch, ExpertBank)]

    @property
    def follows(self) -> bool:  # type: ignore[override]
        return self.router.follows

    def forward(
        self, x: Float[Tensor, "*b d"], keep: Bool[Tensor, "*b"] | None = None, earlier: tuple[Trace, ...] = ()
    ) -> tuple[Float[Tensor, "*b d"], tuple[Trace, ...]]:
        return self.of_tokens(partial(self.tokens, earlier=earlier), x, keep)

    def tokens(
        self, x: Float[Tensor, "t d"], earlier: tuple[Trace, ...] = ()
    ) -> tuple[Float[Tensor, "t d"], tuple[Trace, ...]]:
        routing = self.router(x, earlier[-1].routing) if self.follows and earlier else self.router(x)
        if "rows" not in self.record:
            return reduce(torch.add, [branch(x, routing) for branch in self.branches]), (Trace(self, x, routing),)
        routing = routing.grouped()
        rows = self.bank.run(routing.gather(x), routing.offsets)
        others = [branch(x, routing) for branch in self.branches if branch is not self.bank]
        return reduce(torch.add, others, routing.combine(rows)), (Trace(self, x, routing, rows),)

    def reindex(self, index: Int[Tensor, "m"]) -> None:
        """Make new expert j the old expert `index[j]`, in the router and every bank; -1 makes a fresh one."""
        self.router.reindex(index)
        for bank in self.banks():
            bank.reindex(index)

    def expert_widths(self) -> Float[Tensor, "e"] | float:
        """Hidden units of every expert, all banks together; one number where all experts are equal."""
        widths: Tensor | float = 0.0
        for bank in self.banks():
            widths = widths + bank.row_widths()
        return widths

    def flops(self, routing: Routing) -> Cost:
        """Forward FLOPs that `routing` shows were used: router, experts and shared branches."""
        branches = sum((branch.flops(routing) for branch in self._branches()), NOTHING)
        return branches + Cost.exact(self.router.flops(routing.n_tokens))

    def expected_token_flops(self) -> float:
        rows = self.router.rows_per_token()
        return self.router.flops(1) + sum(branch.expected_token_flops(rows) for branch in self._branches())

    def _branches(self) -> "list[ExpertBank | SharedExpert]":
        return list(self.branches)  # type: ignore[arg-type]

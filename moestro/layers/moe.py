"""A mixture-of-experts layer: router + branches, nothing else."""

from collections.abc import Sequence
from functools import partial, reduce
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moestro.cost import NOTHING, Cost, Kept
from moestro.experts.base import ExpertBank
from moestro.experts.dense_mlp import DenseMLP
from moestro.experts.free_adapters import FreeAdapters
from moestro.experts.hyper import HyperExpert
from moestro.experts.shared import OutputBias, SharedExpert
from moestro.layers.base import TokenLayer
from moestro.layers.recording import ActiveRows
from moestro.routers.base import Router
from moestro.routing import Overheard, Routing, Trace


class MoELayer(TokenLayer):
    """y = sum over branches of branch(x, routing), routing = router(x), or router(x, routing of the layer before) where
    the router `follows`.

    A branch is anything called so: an `ExpertBank`, a shared expert that ignores the routing, ... `record` keeps
    outputs of the first bank's experts, before they are combined, in the trace (through the definition, not the fast
    path): those of the routing, and further ones that it asks for.
    `clusters` groups the experts for losses and rules: so many equal clusters of consecutive experts, or the cluster of
    every expert; kept in the buffer `cluster` [e], which is None without.

    Raises: ValueError where router and banks disagree about the number of experts.
    """

    cluster: Tensor | None

    def __init__(
        self,
        router: Router,
        branches: Sequence[nn.Module],
        record: ActiveRows | None = None,
        clusters: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        banks = [branch for branch in branches if isinstance(branch, ExpertBank)]
        if not banks:
            raise ValueError(f"branches={[type(b).__name__ for b in branches]}, allowed: at least one bank of experts")
        self.router, self.branches, self.record = router, nn.ModuleList(branches), record
        for part in self._numbered():
            if part.n_experts != router.n_experts:
                raise ValueError(f"the router knows {router.n_experts} experts, {type(part).__name__} {part.n_experts}")
        self.register_buffer("cluster", None if clusters is None else cluster_ids(clusters, router.n_experts))

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
        routing = self.route(x, earlier)
        if self.record is None:
            return reduce(torch.add, self._outputs(x, routing)), (Trace(self, x, routing),)
        routing = routing.grouped()
        rows, further = self.bank.run(routing.gather(x), routing.offsets), self.record(routing)
        others = [branch(x, routing) for branch in self.branches if branch is not self.bank]
        overheard = further and Overheard(further, self.bank.run(further.gather(x), further.offsets))
        return reduce(torch.add, others, routing.combine(rows)), (Trace(self, x, routing, rows, overheard=overheard),)

    def _outputs(self, x: Float[Tensor, "t d"], routing: Routing) -> list[Float[Tensor, "t d"]]:
        """Of every branch: all banks begin, then the other branches are computed, then the banks finish."""
        begun = {bank: bank.begin(x, routing) for bank in self.banks()}
        others = {branch: branch(x, routing) for branch in self.branches if branch not in begun}
        done = others | {bank: finish() for bank, finish in begun.items()}
        return [done[branch] for branch in self.branches]

    def route(self, x: Float[Tensor, "t d"], earlier: tuple[Trace, ...] = ()) -> Routing:
        """The router's decision."""
        return self.router(x, earlier[-1].routing) if self.follows and earlier else self.router(x)

    def reindex(self, index: Int[Tensor, "m"]) -> None:
        """Make new expert j the old expert `index[j]`, in the router and every bank; -1 makes a fresh one, in the
        cluster that its position had, or the last expert's beyond the end."""
        self.router.reindex(index)
        if self.cluster is not None:
            place = torch.arange(len(index), device=index.device).clamp(max=len(self.cluster) - 1)
            self.cluster = self.cluster[torch.where(index >= 0, index, place)]
        for part in self._numbered():
            part.reindex(index)

    def expert_widths(self) -> Float[Tensor, "e"] | float:
        """Hidden units of every expert, all banks together; one number where all experts are equal."""
        widths: Tensor | float = 0.0
        for bank in self.banks():
            widths = widths + bank.row_widths()
        return widths

    def flops(self, routing: Routing) -> Cost:
        """Forward FLOPs that `routing` shows were used: router, experts and shared branches."""
        branches = sum((branch.flops(routing).of_weights(branch.parameters()) for branch in self._branches()), NOTHING)
        return branches + Cost.exact(self.router.flops(routing.n_tokens)).of_weights(self.router.parameters())

    def expected_token_flops(self) -> float:
        rows = self.router.rows_per_token()
        return self.router.flops(1) + sum(branch.expected_token_flops(rows) for branch in self._branches())

    def kept_per_token(self, d_model: int) -> Kept:
        rows, kept = self.router.rows_per_token(), self.router.kept_per_token()
        for branch in self._branches():
            if branch is self.bank and self.record is not None:
                recorded = self.record.rows_per_token(rows, self.router.n_experts)
                kept += ExpertBank.kept_per_token(self.bank, recorded, d_model)
            elif isinstance(branch, ExpertBank):
                kept += branch.kept_per_token(rows, d_model)
            else:
                kept += Kept.of_flops(branch.expected_token_flops(rows), d_model)
        return kept

    def _numbered(self) -> list[Any]:
        """The branches that know experts by their numbers: banks, and what is made of a routing."""
        return [branch for branch in self.branches if hasattr(branch, "n_experts")]

    def _branches(self) -> "list[ExpertBank | SharedExpert | DenseMLP | OutputBias | HyperExpert | FreeAdapters]":
        return list(self.branches)  # type: ignore[arg-type]


def cluster_ids(clusters: int | Sequence[int], n_experts: int) -> Int[Tensor, "e"]:
    """The cluster of every expert.

    Raises: ValueError where the experts do not make these clusters.
    """
    if not isinstance(clusters, int):
        if len(clusters) != n_experts or sorted(set(clusters)) != list(range(max(clusters, default=0) + 1)):
            raise ValueError(f"clusters={list(clusters)}, allowed: for each of {n_experts} experts one of 0, 1, ..., m")
        return torch.tensor(list(clusters))
    if clusters < 1 or n_experts % clusters:
        raise ValueError(f"clusters={clusters}, allowed: a divisor of {n_experts}, the number of experts")
    return torch.arange(n_experts) // (n_experts // clusters)

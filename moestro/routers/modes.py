"""Experts in a grid: one score and one set of gates for each of its dimensions."""

import math
from collections.abc import Sequence
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor, nn

from moestro.routers.base import Router
from moestro.routers.scores import LinearScore
from moestro.routers.selects import Soft
from moestro.routing import SoftRouting


class ModesRouter(Router):
    """Gates a_m = gate(norm(x G_m)) for each mode m of a grid of experts; expert (n_1, n_2, ...) is weighted by
    a_1[n_1] a_2[n_2] ... (Oldfield 2024, muMoE, arXiv:2402.12550, hierarchical mixtures). Experts are numbered row by
    row, the last mode fastest.

    The cost is that of sum(modes) logits, of prod(modes) experts; no matrix of joint logits exists. G starts at zero
    unless `init_std` says otherwise, so that all experts are weighted alike. Norms as in `Soft`: `batch` is not causal.

    Raises: ValueError where the modes do not make `n_experts`.
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        modes: Sequence[int],
        gate: str = "entmax15",
        norm: Literal["none", "layer", "batch"] = "layer",
        norm_eps: float = 1e-5,
        init_std: float = 0.0,
    ) -> None:
        super().__init__()
        if not modes or math.prod(modes) != n_experts:
            raise ValueError(f"modes={list(modes)}, allowed: a product of {n_experts}, the number of experts")
        self.scores = nn.ModuleList([LinearScore(d_model, n, init_std) for n in modes])
        self.select = Soft(gate, norm, norm_eps)

    @property
    def n_experts(self) -> int:  # type: ignore[override]
        return math.prod(score.n_experts for score in self._scores())

    @property
    def causal(self) -> bool:  # type: ignore[override]
        return self.select.causal

    def forward(self, x: Float[Tensor, "t d"]) -> SoftRouting:
        routings = [self.select(score(x)) for score in self._scores()]
        return SoftRouting(tuple(routing.modes[0] for routing in routings))

    def reindex(self, index: Int[Tensor, "m"]) -> None:
        """Move the experts of a single mode.

        Raises: ValueError for more modes: there an expert is named by its place in each, and not free to move.
        """
        if len(self.scores) > 1:
            raise ValueError("an expert of several modes is named by its place in the grid and cannot be moved")
        self._scores()[0].reindex(index)

    def flops(self, n_tokens: int) -> float:
        return sum(score.flops(n_tokens) for score in self._scores())

    def rows_per_token(self) -> float:
        return self.n_experts

    def _scores(self) -> list[LinearScore]:
        return list(self.scores)  # type: ignore[arg-type]

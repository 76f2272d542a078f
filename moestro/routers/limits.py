"""`Capacity`: a selection of which experts keep only so many rows."""

from jaxtyping import Bool, Float, Int
from torch import Tensor

from moestro.routers.selects import Select
from moestro.routing import SparseRouting
from moestro.routing.capacity import PRIORITIES, available, limited, rows_allowed


class Capacity(Select):
    """Another selection, of which every expert keeps max(ceil(factor * tokens / experts), minimum) rows at most.

    In training only, unless `eval_factor` says otherwise: whether a row is kept depends on the other tokens of the
    batch, so limited routings are not causal, and evaluation and generation drop nothing. Experts are those that are
    available. Priorities are those of `moestro.routing.capacity`; the default is XMoE's (arXiv:2403.18926).

    Raises: ValueError where the selection gives no `SparseRouting`.
    """

    def __init__(
        self,
        select: Select,
        factor: float,
        minimum: int = 1,
        priority: str = "rank",
        eval_factor: float | None = None,
    ) -> None:
        super().__init__()
        if not factor > 0 or (eval_factor is not None and not eval_factor > 0):
            raise ValueError(f"factor={factor}, eval_factor={eval_factor}, allowed: above 0")
        if minimum < 0:
            raise ValueError(f"minimum={minimum}, allowed: at least 0")
        if priority not in PRIORITIES:
            raise ValueError(f"priority={priority!r}, allowed: {', '.join(PRIORITIES)}")
        self.select, self.factor, self.minimum, self.eval_factor = select, factor, minimum, eval_factor
        self.priority = priority

    @property
    def causal(self) -> bool:  # type: ignore[override]
        return self.select.causal and self.eval_factor is None

    def forward(self, logits: Float[Tensor, "t e"]) -> SparseRouting:
        routing = self.select(logits)
        if not isinstance(routing, SparseRouting):
            raise ValueError(f"capacity limits rows of tokens; {type(self.select).__name__} has none to drop")
        factor = self.factor if self.training else self.eval_factor
        if factor is None:
            return routing
        return limited(routing, rows_allowed(len(logits), len(available(logits)), factor, self.minimum), self.priority)

    def check_available(self, available: Bool[Tensor, "e"]) -> None:
        self.select.check_available(available)

    def reindex(self, index: Int[Tensor, "m"]) -> None:
        self.select.reindex(index)

    def most_experts(self, n_experts: int) -> int:
        return self.select.most_experts(n_experts)

    def rows_per_token(self, n_experts: int) -> float:
        return min(self.factor, self.select.rows_per_token(n_experts))

    def choices(self, n_experts: int) -> tuple[int | None, bool, tuple[str, ...]]:
        return self.select.choices(n_experts)

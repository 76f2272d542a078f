"""`Router`, and the kind most systems use: a score for every expert, then a selection."""

from jaxtyping import Float, Int
from torch import Tensor, nn

from moestro.routers.scores import Score
from moestro.routers.selects import Select
from moestro.routing import Routing


class Router(nn.Module):
    """Tokens -> `Routing`. `causal` is False where a token's routing depends on other tokens."""

    n_experts: int
    causal: bool = True

    def forward(self, x: Float[Tensor, "t d"]) -> Routing:
        raise NotImplementedError

    def reindex(self, index: Int[Tensor, "m"]) -> None:
        """Make new expert j the old expert `index[j]`; -1 makes a fresh one."""
        raise NotImplementedError

    def flops(self, n_tokens: int) -> float:
        """Forward FLOPs of routing `n_tokens` tokens."""
        raise NotImplementedError

    def rows_per_token(self) -> float:
        """Rows a token is expected to cost before anything is learned (equal probabilities)."""
        raise NotImplementedError


class ScoredRouter(Router):
    """routing = select(score(x))."""

    def __init__(self, score: Score, select: Select) -> None:
        super().__init__()
        select.check(score.n_experts)
        self.score, self.select = score, select

    @property
    def n_experts(self) -> int:  # type: ignore[override]
        return self.score.n_experts

    @property
    def causal(self) -> bool:  # type: ignore[override]
        return self.select.causal

    def forward(self, x: Float[Tensor, "t d"]) -> Routing:
        return self.select(self.score(x))

    def reindex(self, index: Int[Tensor, "m"]) -> None:
        self.select.check(len(index))
        self.score.reindex(index)

    def flops(self, n_tokens: int) -> float:
        return self.score.flops(n_tokens)

    def rows_per_token(self) -> float:
        return self.select.rows_per_token(self.n_experts)

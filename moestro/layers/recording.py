"""What a layer keeps of its experts' outputs: those that make its output, and some that it computes to be kept only."""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from moestro.routers.sampling import gumbel
from moestro.routing import Routing, SparseRouting


class ActiveRows(nn.Module):
    """Outputs of the experts that each token chose: nothing is computed that is not computed anyway."""

    def forward(self, routing: Routing) -> SparseRouting | None:
        """Further rows to compute, in expert order and with weight 0; None where there are none."""
        return None

    def rows_per_token(self, rows: float, n_experts: int) -> float:
        """Rows of a token whose output is computed in training, where it chose `rows`."""
        return rows


def _free(routing: Routing) -> Bool[Tensor, "t e"]:
    """Which available experts each token did not choose.

    Raises: ValueError where rows are mixtures of tokens.
    """
    meetings = routing.meetings()
    if meetings is None:
        raise ValueError(f"{type(routing).__name__} mixes tokens: no expert could be recorded on one of them")
    token, expert = meetings
    free = torch.ones(routing.n_tokens, routing.n_experts, dtype=torch.bool, device=token.device)
    free[token, expert] = False
    return free if routing.logits is None else free & (routing.logits > -torch.inf)


def _unweighted(token: Tensor, expert: Tensor, like: Routing, dtype: torch.dtype) -> SparseRouting:
    weight = torch.zeros(len(token), dtype=dtype, device=token.device)
    return SparseRouting(token, expert, weight, like.n_tokens, like.n_experts).grouped()


class AllRows(ActiveRows):
    """While training, outputs of every available expert on every token; else those that the token chose."""

    def forward(self, routing: Routing) -> SparseRouting | None:
        if not self.training:
            return None
        token, expert = _free(routing).nonzero(as_tuple=True)
        return _unweighted(token, expert, routing, torch.float32)

    def rows_per_token(self, rows: float, n_experts: int) -> float:
        return float(n_experts)


class SampledRows(ActiveRows):
    """While training, outputs of `extra` further experts a token besides those it chose, drawn without replacement from
    the available others: uniformly, or in proportion to their `probability`. Top-1 has no pair of experts without.

    The draw is a function of `seed` and of the token's own logits, as in `SampledSecond`: nothing to save, and the same
    when recomputed, resumed or split into other micro-batches. Tokens of equal logits draw alike.
    """

    def __init__(self, extra: int = 1, by: Literal["uniform", "probability"] = "uniform", seed: int = 0) -> None:
        super().__init__()
        if extra < 1:
            raise ValueError(f"extra={extra}, allowed: at least 1")
        if by not in ("uniform", "probability"):
            raise ValueError(f"by={by!r}, allowed: uniform, probability")
        self.extra, self.by, self.seed = extra, by, seed

    def forward(self, routing: Routing) -> SparseRouting | None:
        """Raises: ValueError where there is no logit for every expert."""
        if not self.training:
            return None
        if routing.logits is None:
            raise ValueError("record: sampled needs a logit for every expert, which product keys do not have")
        falling, order = routing.logits.detach().sort(dim=-1, descending=True, stable=True)
        free = _free(routing).gather(1, order)
        score = self._scores(falling).masked_fill(~free, -torch.inf)
        rank = score.topk(min(self.extra, routing.n_experts)).indices
        token, place = free.gather(1, rank).nonzero(as_tuple=True)
        return _unweighted(token, order[token, rank[token, place]], routing, falling.dtype)

    def rows_per_token(self, rows: float, n_experts: int) -> float:
        return min(rows + self.extra, float(n_experts))

    def _scores(self, falling: Float[Tensor, "t e"]) -> Float[Tensor, "t e"]:
        noise = gumbel(falling, self.seed)
        return noise if self.by == "uniform" else falling + noise

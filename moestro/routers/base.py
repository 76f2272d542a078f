"""`Router`, and the kind most systems use: a score for every expert, then a selection."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moestro.cost import Kept
from moestro.ops.reindexed import reindexed
from moestro.routers.family import SelectionFamily, size_of
from moestro.routers.scores import Score
from moestro.routers.selects import Select
from moestro.routing import Routing


class Router(nn.Module):
    """Tokens -> `Routing`. `causal` is False where a token's routing depends on other tokens. A router that `follows`
    takes one argument more: the same tokens' routing in the layer before, None in the first."""

    n_experts: int
    causal: bool = True
    follows: bool = False

    def forward(self, x: Float[Tensor, "t d"]) -> Routing:
        raise NotImplementedError

    @property
    def most_experts(self) -> int:
        """The end of what `top_k` may be set to, where the router has it."""
        return self.n_experts

    def reindex(self, index: Int[Tensor, "m"]) -> None:
        """Make new expert j the old expert `index[j]`; -1 makes a fresh one."""
        raise NotImplementedError

    def flops(self, n_tokens: int) -> float:
        """Forward FLOPs of routing `n_tokens` tokens."""
        raise NotImplementedError

    def rows_per_token(self) -> float:
        """Rows a token is expected to cost before anything is learned (equal probabilities)."""
        raise NotImplementedError

    def kept_per_token(self) -> Kept:
        """What a token leaves for backward: float32 logits, probabilities and what a loss makes of them, and 40
        bytes (token, expert, weight, in two orders) a row."""
        return Kept(bytes=12.0 * self.n_experts + 40.0 * self.rows_per_token())

    def selection_family(self) -> SelectionFamily:
        """The selections that its parameters can express: where no more is known, any set of experts, with as many
        dimensions as parameters."""
        unknown = f"{type(self).__name__}: any set of experts, as many dimensions as parameters"
        return SelectionFamily(self.n_experts, self.n_experts, None, False, size_of(self), (unknown,), self.causal)


class ScoredRouter(Router):
    """routing = select(score(x)), with the logits of experts that are not available at -inf.

    `available` [e] is a buffer, kept by checkpoints: which experts of a pool of fixed size take part. An expert that
    does not gets no probability, is never chosen and learns nothing, while its weights stay. The first
    `first_available` do at the start, all where it is None. `resting` [e], kept as well, are those that take no part
    while the router trains, and do when it is evaluated. `forward` never changes either; rules do, between steps,
    through `set_available` and `set_resting`.
    """

    available: Tensor
    resting: Tensor

    def __init__(self, score: Score, select: Select, first_available: int | None = None) -> None:
        super().__init__()
        n_experts = score.n_experts
        if first_available is not None and not 1 <= first_available <= n_experts:
            raise ValueError(f"first_available={first_available}, allowed: 1 to {n_experts}, the number of experts")
        self.first_available = first_available
        # on the CPU, to be looked at where the model is built on the meta device
        first = torch.arange(n_experts, device="cpu") < (first_available or n_experts)
        select.check_available(first)
        self.score, self.select = score, select
        self.register_buffer("available", first.to(torch.get_default_device()))
        self.register_buffer("resting", torch.zeros(n_experts, dtype=torch.bool))

    @property
    def n_experts(self) -> int:  # type: ignore[override]
        return self.score.n_experts

    @property
    def causal(self) -> bool:  # type: ignore[override]
        return self.select.causal

    @property
    def most_experts(self) -> int:
        return self.select.most_experts(self.n_experts)

    def forward(self, x: Float[Tensor, "t d"]) -> Routing:
        return self.routed(self.score(x))

    def routed(self, logits: Float[Tensor, "t e"]) -> Routing:
        """The selection among the experts that take part now."""
        absent = ~self.available | self.resting if self.training else ~self.available
        return self.select(logits.masked_fill(absent, -math.inf))

    @torch.no_grad()
    def set_available(self, available: Bool[Tensor, "e"]) -> None:
        """Let exactly these experts take part.

        Raises: ValueError for none, or for fewer than the selection needs.
        """
        self._check(available, self.resting)
        self.available.copy_(available)

    @torch.no_grad()
    def set_resting(self, resting: Bool[Tensor, "e"]) -> None:
        """Let exactly these experts rest while the router trains.

        Raises: ValueError where none would be left, or fewer than the selection needs.
        """
        self._check(self.available, resting)
        self.resting.copy_(resting)

    def _check(self, available: Tensor, resting: Tensor) -> None:
        for present in (available, available & ~resting):
            if not bool(present.any()):
                raise ValueError(f"available={present.tolist()}, allowed: at least one expert")
            self.select.check_available(present)

    def reindex(self, index: Int[Tensor, "m"]) -> None:
        """Experts take their availability with them; a fresh one is available and does not rest."""
        available, resting = reindexed(self.available, index, True), reindexed(self.resting, index, False)
        self._check(available, resting)
        self.score.reindex(index)
        self.select.reindex(index)
        self.available, self.resting = available, resting

    def selection_family(self) -> SelectionFamily:
        """The largest sums of k linear scores are multiclass predictions linear in the T d weights, whose Natarajan
        dimension is at most their number (Shalev-Shwartz and Ben-David 2014, Theorem 29.7)."""
        present = int(self.available.sum())
        most, fixed, remarks = self.select.choices(present)
        if not self.score.linear:
            remarks = (*remarks, f"{type(self.score).__name__} is not linear: its parameters are counted")
        if self.follows:
            remarks = (*remarks, "the layer before has a part in the scores")
        return SelectionFamily(present, self.n_experts, most, fixed, size_of(self), remarks, self.causal)

    def flops(self, n_tokens: int) -> float:
        return self.score.flops(n_tokens)

    def rows_per_token(self) -> float:
        return self.select.rows_per_token(self.first_available or self.n_experts)

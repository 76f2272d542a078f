"""`GroupedRouter`: a token first chooses groups of experts, then experts inside them."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moestro.ops.order import largest
from moestro.routers.base import Router
from moestro.routers.scores import LinearScore, Score
from moestro.routing import SparseRouting


class GroupedRouter(Router):
    """The k most probable experts of the `top_groups` most probable groups (MoHGE, arXiv:2604.23108).

    P(g) = softmax over groups of group_score(x); P(e) = P(g) softmax over the experts of its group g of score(x). k
    experts are chosen over all chosen groups together, and their gates are their P(e), renormalised to sum to 1 unless
    told otherwise: so both levels learn from the language model. The paper's abstract and reviews say which groups and
    experts are chosen; that the levels multiply is ours. Ties go to the lower group and expert.

    `groups` are the numbers of experts in each group, in order. The buffer `group` [e] says to which one an expert
    belongs; experts that move (`reindex`) take it with them. The routing's logits are log P(e), its raw ones those
    of the experts.
    """

    group: Tensor

    def __init__(
        self,
        d_model: int,
        score: Score,
        groups: Sequence[int],
        top_groups: int,
        top_k: int,
        renormalize: bool = True,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        if min(groups, default=0) < 1 or sum(groups) != score.n_experts:
            raise ValueError(f"groups={list(groups)}, allowed: sizes above 0 that sum to {score.n_experts} experts")
        if not 1 <= top_groups <= len(groups):
            raise ValueError(f"top_groups={top_groups}, allowed: 1 to {len(groups)}, the number of groups")
        self.score, self.group_score = score, LinearScore(d_model, len(groups), init_std)
        self.top_groups, self.top_k, self.renormalize = top_groups, top_k, renormalize
        self.register_buffer("group", torch.tensor([g for g, size in enumerate(groups) for _ in range(size)]))
        self._check(groups)

    def _fewest(self, sizes: Sequence[int]) -> int:
        return sum(sorted(sizes)[: self.top_groups])

    @property
    def most_experts(self) -> int:
        return self._fewest(torch.bincount(self.group, minlength=self.group_score.n_experts).tolist())

    def _check(self, sizes: Sequence[int]) -> None:
        """Raises: ValueError where some choice of groups has too few experts."""
        fewest = self._fewest(sizes)
        if not 1 <= self.top_k <= fewest:
            raise ValueError(
                f"top_k={self.top_k}, allowed: 1 to {fewest}, the experts of the {self.top_groups} smallest groups"
            )

    @property
    def n_experts(self) -> int:  # type: ignore[override]
        return self.score.n_experts

    def members(self) -> Bool[Tensor, "g e"]:
        """Which experts belong to each group."""
        return self.group == torch.arange(self.group_score.n_experts, device=self.group.device)[:, None]

    def forward(self, x: Float[Tensor, "t d"]) -> SparseRouting:
        logits, members = self.score(x), self.members()
        inside = logits[:, None, :].masked_fill(~members, -math.inf).logsumexp(-1)
        log_groups = self.group_score(x).log_softmax(-1)
        log_p = (log_groups - inside)[:, self.group] + logits
        chosen = largest(log_groups, self.top_groups)
        allowed = members[chosen].any(1)
        masked = log_p.masked_fill(~allowed, -math.inf)
        expert = largest(masked, self.top_k)
        gates = log_p.gather(1, expert)
        gates = gates.softmax(-1) if self.renormalize else gates.exp()
        return SparseRouting.from_topk(expert, gates, self.n_experts, log_p, raw=logits)

    def reindex(self, index: Int[Tensor, "m"]) -> None:
        """A fresh expert joins the group its position had, or the last group beyond the end.

        Raises: ValueError where a group would have no expert left, or too few to choose from.
        """
        at = torch.arange(len(index), device=index.device).clamp(max=self.n_experts - 1)
        group = self.group[torch.where(index >= 0, index, at)]
        sizes = torch.bincount(group, minlength=self.group_score.n_experts).tolist()
        if min(sizes) == 0:
            raise ValueError(f"index={index.tolist()} leaves group {sizes.index(0)} without experts")
        self._check(sizes)
        self.score.reindex(index)
        self.group = group

    def flops(self, n_tokens: int) -> float:
        return self.score.flops(n_tokens) + self.group_score.flops(n_tokens)

    def rows_per_token(self) -> float:
        return self.top_k

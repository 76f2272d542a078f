"""`GroupLimit`: in how many groups of experts a token looks."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moestro.ops.order import largest


@dataclass(frozen=True)
class GroupLimit:
    """A token looks for experts only in its `top_groups` best groups of consecutive experts, of `n_groups` equal ones
    or of the given `sizes`.

    A group's score is the mean of its `best` largest scores (of all it has, where it is smaller): 1 ranks groups as
    DeepSeek-V2 does (arXiv:2405.04434, section 2.2.2), 2 as DeepSeek-V3 does (arXiv:2412.19437, whose sum of two is
    twice the mean). Ties go to the lower group. The default limits nothing. An expert whose value is -inf is not
    available: its group is one without it.
    """

    n_groups: int = 1
    top_groups: int = 1
    best: int = 1
    sizes: tuple[int, ...] = ()

    @property
    def limits(self) -> bool:
        """Whether there are groups in which a token does not look."""
        return self.top_groups < self.n_groups

    def check(self, n_experts: int, top_k: int, available: Bool[Tensor, "e"] | None = None) -> None:
        """Raises: ValueError where `n_experts` do not make these groups, or some choice of groups does not hold `top_k`
        experts, of those `available` where it is given."""
        if not 1 <= self.n_groups <= n_experts:
            raise ValueError(f"n_groups={self.n_groups}, allowed: 1 to {n_experts}, the number of experts")
        if not 1 <= self.top_groups <= self.n_groups or self.best < 1:
            raise ValueError(
                f"top_groups={self.top_groups}, best={self.best}, allowed: 1 to {self.n_groups} groups, best at least 1"
            )
        sizes = self.group_sizes(n_experts)
        if available is not None:
            sizes = [int(group.sum()) for group in available.split(sizes)]
        if self.limits and self._fewest(sizes) < top_k:
            raise ValueError(f"top_k={top_k}, but {self.top_groups} groups of sizes {sizes} may hold fewer experts")

    def most_experts(self, n_experts: int) -> int:
        """Experts that the smallest groups a token may look in hold."""
        return self._fewest(self.group_sizes(n_experts))

    def _fewest(self, sizes: Sequence[int]) -> int:
        return sum(sorted(sizes)[: self.top_groups])

    def group_sizes(self, n_experts: int) -> list[int]:
        """Experts of every group.

        Raises: ValueError where they do not add up.
        """
        sizes = list(self.sizes or [n_experts // self.n_groups] * self.n_groups)
        if len(sizes) != self.n_groups or sum(sizes) != n_experts or min(sizes) < 1:
            raise ValueError(f"n_groups={self.n_groups} of sizes {sizes} do not make {n_experts} experts")
        return sizes

    def __call__(self, values: Float[Tensor, "t e"], scores: Float[Tensor, "t e"]) -> Float[Tensor, "t e"]:
        """The values, -inf for experts outside of the groups that are the token's best by their scores."""
        if self.top_groups == self.n_groups:
            return values
        sizes = self.group_sizes(scores.shape[1])
        present = scores.masked_fill(values == -torch.inf, -torch.inf)
        each = [_mean_of_best(group, self.best) for group in present.split(sizes, dim=1)]
        best = largest(torch.stack(each, 1), self.top_groups)
        chosen = torch.zeros(len(scores), len(sizes), dtype=torch.bool, device=scores.device).scatter_(1, best, True)
        inside = torch.cat([chosen[:, i : i + 1].expand(-1, size) for i, size in enumerate(sizes)], 1)
        return values.masked_fill(~inside, -torch.inf)


def _mean_of_best(group: Float[Tensor, "t n"], best: int) -> Float[Tensor, "t"]:
    """Mean of the `best` largest of a group's scores that are not -inf; -inf where all are."""
    top = group.topk(min(best, group.shape[1])).values
    there = top > -torch.inf
    return torch.where(there[:, 0], top.masked_fill(~there, 0.0).sum(-1) / there.sum(-1), -torch.inf)


EVERYWHERE = GroupLimit()

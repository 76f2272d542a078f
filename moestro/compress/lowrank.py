"""A matrix as a product of two thin ones, and how many ranks each expert gets (MoE-I2, arXiv:2411.01016, stage 2)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def factors(
    matrix: Float[Tensor, "m n"], rank: int, moments: Float[Tensor, "n n"] | None = None, ridge: float = 1e-6
) -> tuple[Float[Tensor, "m r"], Float[Tensor, "r n"]]:
    """A and B of so many columns and rows whose product is nearest to W = `matrix`, in its dtype.

    Plain: W = U S V', A = U_r S_r^1/2, B = S_r^1/2 V_r', nearest in the Frobenius norm (Eckart-Young). With `moments`,
    X'X of the inputs X [tokens n] (or their mean), nearest in ||X W' - X (A B)'||_F: the decomposition is of W C, C C'
    = X'X + ridge mean(diag) 1, and B = S_r^1/2 V_r' C^-1 (Wang 2024, SVD-LLM, arXiv:2403.07378). In float64 inside;
    small formats lose the full rank's exactness when the factors are rounded to them.

    Raises: ValueError for a rank outside 1 to min(m, n).
    """
    if not 1 <= rank <= min(matrix.shape):
        raise ValueError(f"rank={rank}, allowed: 1 to {min(matrix.shape)}, the smaller side of {tuple(matrix.shape)}")
    wide = matrix.double()
    root = None if moments is None else root_of(moments, ridge)
    u, s, vt = torch.linalg.svd(wide if root is None else wide @ root, full_matrices=False)
    half = s[:rank].sqrt()
    a, b = u[:, :rank] * half, half[:, None] * vt[:rank]
    if root is not None:
        b = torch.linalg.solve_triangular(root, b, upper=False, left=False)
    return a.to(matrix.dtype), b.to(matrix.dtype)


def root_of(moments: Float[Tensor, "n n"], ridge: float) -> Float[Tensor, "n n"]:
    """Lower triangular C with C C' = moments + ridge mean(diag) 1; of moments of no inputs at all, the identity."""
    wide = moments.double()
    scale = wide.diagonal().mean()
    if float(scale) == 0:
        return torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
    return torch.linalg.cholesky(wide + ridge * scale * torch.eye(len(wide), dtype=wide.dtype, device=wide.device))


def rank_keeping(fraction: float, m: int, n: int) -> int:
    """The rank at which both factors have this fraction of an m x n matrix's parameters: floor(f m n / (m + n)).

    Raises: ValueError where that is no rank.
    """
    rank = int(fraction * m * n / (m + n))
    if not 1 <= rank <= min(m, n):
        raise ValueError(f"fraction={fraction} of a {m} x {n} matrix is rank {rank}, allowed: 1 to {min(m, n)}")
    return rank


def allocate_ranks(importance: Sequence[float], mean: int, lowest: int, highest: int) -> list[int]:
    """Ranks in proportion to importance, each from `lowest` to `highest`, whose sum is `mean` times their number
    exactly.

    r_j = clamp(round(mean E e_j / sum e)), then one rank at a time is given to or taken from the expert whose rank lies
    furthest from its share. The rule's form is remembered from the paper, clamps and repair are ours. Without any
    importance, all are equal. Ties go to the lower expert.

    Raises: ValueError where the mean lies outside the clamps, or an importance is negative.
    """
    if not 1 <= lowest <= mean <= highest or min(importance) < 0:
        raise ValueError(
            f"mean={mean}, lowest={lowest}, highest={highest}, allowed: 1 <= lowest <= mean <= highest, "
            f"and no importance below 0 (least {min(importance)})"
        )
    total, count = sum(importance), len(importance)
    shares = [mean * count * value / total if total > 0 else float(mean) for value in importance]
    ranks = [min(highest, max(lowest, round(share))) for share in shares]
    while (missing := mean * count - sum(ranks)) != 0:
        step = 1 if missing > 0 else -1
        free = [j for j in range(count) if lowest <= ranks[j] + step <= highest]
        chosen = max(free, key=lambda j: (step * (shares[j] - ranks[j]), -j))
        ranks[chosen] += step
    return ranks

"""Matrix-product operators: a matrix as a chain of small tensors, there and back."""

from collections.abc import Sequence
from functools import reduce
from math import prod

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def mpo_factors(size: int, parts: int = 5) -> tuple[int, ...]:
    """`size` as a product of so many numbers that are as equal as its prime factors allow, the greatest in the middle.

    A large prime factor makes the middle large and leaves ones beside it. 3072 and 768 give the factors of Gao 2022,
    arXiv:2203.01104.
    """
    found = [1] * parts
    for prime in _primes(size):
        found[found.index(min(found))] *= prime
    outward = sorted(range(parts), key=lambda place: (abs(place - parts // 2), -place))
    placed = dict(zip(outward, sorted(found, reverse=True), strict=True))
    return tuple(placed[place] for place in range(parts))


def _primes(number: int) -> list[int]:
    """Prime factors, the greatest first."""
    found, prime = [], 2
    while number > 1:
        while number % prime == 0:
            found.append(prime)
            number //= prime
        prime += 1 if prime * prime <= number else max(1, number - prime)
    return found[::-1]


def mpo_bonds(rows: Sequence[int], columns: Sequence[int], most: int | None = None) -> list[int]:
    """D_0 ... D_n: the smaller of the products of i_m j_m up to a bond and beyond it, and at most `most` (Gao 2022,
    arXiv:2203.01104; D_0 = D_n = 1)."""
    pairs = [i * j for i, j in zip(rows, columns, strict=True)]
    full = [min(prod(pairs[:k]), prod(pairs[k:])) for k in range(len(pairs) + 1)]
    return [bond if most is None else min(bond, most) for bond in full]


def mpo_cores(
    matrix: Float[Tensor, "i j"], rows: Sequence[int], columns: Sequence[int], most: int | None = None
) -> list[Float[Tensor, "_ _ _ _"]]:
    """Cores T_k [D_{k-1}, i_k, j_k, D_k] of a matrix [prod i_k, prod j_k], in the gauge of `balanced`:

        W[(i_1 .. i_n), (j_1 .. j_n)] = T_1[i_1, j_1] T_2[i_2, j_2] ... T_n[i_n, j_n]

    by n - 1 successive singular value decompositions, of which at most `most` terms are kept: the best approximation
    where there is one bond, within sqrt(n - 1) of the best else. Terms below the rounding error are never kept, so that
    bonds of a matrix without full rank are smaller than `mpo_bonds` says.
    """
    n = len(rows)
    order = [place for k in range(n) for place in (k, n + k)]
    rest, cores, bond = matrix.reshape(*rows, *columns).permute(order).reshape(1, -1), [], 1
    for i, j in list(zip(rows, columns, strict=True))[:-1]:
        u, s, v = _svd(rest.reshape(bond * i * j, -1), most)
        cores.append(u.reshape(bond, i, j, len(s)))
        rest, bond = s[:, None] * v, len(s)
    return balanced([*cores, rest.reshape(bond, rows[-1], columns[-1], 1)])


def balanced(cores: Sequence[Float[Tensor, "_ _ _ _"]]) -> list[Float[Tensor, "_ _ _ _"]]:
    """The same matrix, the singular values of every bond split as square roots between its two cores.

    Then the norm lies where most of the parameters do, and what a truncation of bonds keeps are the leading terms.
    Terms below the rounding error are dropped: their inverse roots would be noise of any size.
    """
    left = list(cores)
    for k in range(len(left) - 1):
        q, r = torch.linalg.qr(left[k].flatten(0, 2))
        left[k] = q.unflatten(0, left[k].shape[:3])
        left[k + 1] = torch.tensordot(r, left[k + 1], 1)
    roots: list[Tensor] = [left[0].new_ones(1)] * len(left)
    for k in range(len(left) - 1, 0, -1):
        u, s, v = _svd(left[k].flatten(1), None)
        left[k] = v.unflatten(1, left[k].shape[1:])
        left[k - 1] = torch.tensordot(left[k - 1], u * s, 1)
        roots[k] = s.sqrt()
    inverse = [torch.where(root > 0, 1 / root, 0.0) for root in [*roots[1:], roots[0]]]
    scaled = zip(roots, left, inverse, strict=True)
    return [before[:, None, None, None] * core * after for before, core, after in scaled]


def _svd(matrix: Tensor, most: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """The leading terms, those of rounding left out; one at least."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    rounding = float(s[0]) * max(matrix.shape) * torch.finfo(s.dtype).eps
    kept = max(1, min(int((s > rounding).sum()), len(s) if most is None else most))
    return u[:, :kept], s[:kept], v[:kept]


def mpo_matrix(cores: Sequence[Float[Tensor, "..."]]) -> Float[Tensor, "..."]:
    """The matrix [.., i, j] of a chain of cores [.., a, i, j, b]; dimensions before are batches, which may
    be 1 where cores are shared."""
    return reduce(_joined, cores).squeeze(-1).squeeze(-3)


def _joined(left: Tensor, right: Tensor) -> Tensor:
    """Two neighbours as one core, row and column indices of the left one first."""
    both = torch.einsum("...aijm,...mklb->...aikjlb", left, right)
    return both.flatten(-3, -2).flatten(-4, -3)


def mpo_flops(shapes: Sequence[Sequence[int]]) -> float:
    """FLOPs of `mpo_matrix` for cores of these shapes [a, i, j, b]."""
    total, size = 0.0, prod(shapes[0])
    for a, i, j, b in shapes[1:]:
        total += 2.0 * size * i * j * b
        size = size // a * i * j * b
    return total


def padded(core: Float[Tensor, "a i j b"], before: int, after: int) -> Float[Tensor, "c i j d"]:
    """The core with zeros up to these bonds."""
    return F.pad(core, (0, after - core.shape[3], 0, 0, 0, 0, 0, before - core.shape[0]))

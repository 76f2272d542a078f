"""Which experts form a group: partitions of a similarity matrix (arXiv:2407.09590 has no solver; these are ours)."""

from collections.abc import Iterator, Sequence
from itertools import combinations

from jaxtyping import Float
from torch import Tensor

Groups = list[tuple[int, ...]]
# Partitions that are worth looking at one by one.
ENUMERABLE = 100_000


def stirling(n: int, k: int) -> int:
    """Ways to divide n experts into k groups (Stirling number of the second kind)."""
    row = [1] + [0] * k
    for _ in range(n):
        row = [0, *(j * row[j] + row[j - 1] for j in range(1, k + 1))]
    return row[k]


def partitions(n: int, k: int) -> Iterator[Groups]:
    """Every way to divide 0, ..., n - 1 into k groups, each ascending, ordered by their first members."""

    def grow(expert: int, groups: list[list[int]]) -> Iterator[Groups]:
        if expert == n:
            yield [tuple(group) for group in groups]
            return
        if n - expert > k - len(groups):
            for group in groups:
                group.append(expert)
                yield from grow(expert + 1, groups)
                group.pop()
        if len(groups) < k:
            groups.append([expert])
            yield from grow(expert + 1, groups)
            groups.pop()

    yield from grow(0, [])


def within(alike: Sequence[Sequence[float]], groups: Groups) -> float:
    """Mean similarity of the pairs that share a group; 0 where every expert is alone. Experts alone count nothing."""
    pairs = [pair for group in groups for pair in combinations(group, 2)]
    return sum(alike[i][j] for i, j in pairs) / max(1, len(pairs))


def group_experts(alike: Float[Tensor, "e e"], n_groups: int, largest: int | None = None) -> Groups:
    """The partition into `n_groups` groups of at most `largest` experts that has the largest mean similarity inside.

    Exact where there are at most 100,000 partitions, else by `agglomerate`. Of equal ones the first in the order of
    `partitions`. Groups ascend by their first members.

    Raises: ValueError for a number of groups that the experts do not make.
    """
    n = len(alike)
    if not 1 <= n_groups <= n or (largest is not None and largest * n_groups < n):
        raise ValueError(f"n_groups={n_groups} of at most {largest or n} experts each do not hold {n} experts")
    if stirling(n, n_groups) > ENUMERABLE:
        return agglomerate([alike], n_groups, largest)[0]
    values = alike.tolist()
    allowed = (found for found in partitions(n, n_groups) if largest is None or max(map(len, found)) <= largest)
    return max(allowed, key=lambda found: within(values, found))


def agglomerate(
    alike: Sequence[Float[Tensor, "e e"]], n_groups: int, largest: int | None = None, least: int = 1
) -> list[Groups]:
    """Average linkage: the two groups of the largest mean similarity become one until `n_groups` are left, over all
    layers together: one similarity matrix each, each keeping at least `least` groups. Ties go to the lower layer, then
    to the lower first members.

    Raises: ValueError where no two groups may be merged any more.
    """
    values = [layer.tolist() for layer in alike]
    layers: list[Groups] = [[(expert,) for expert in range(len(layer))] for layer in alike]
    best = [_closest(v, g, largest, least) for v, g in zip(values, layers, strict=True)]
    while sum(map(len, layers)) > n_groups:
        open_layers = [place for place, pair in enumerate(best) if pair is not None]
        if not open_layers:
            left = sum(map(len, layers))
            raise ValueError(
                f"{left} groups are left where {n_groups} were asked for: largest={largest}, least={least}"
            )
        place = max(open_layers, key=lambda at: (best[at][0], -at))  # type: ignore[index]
        _, i, j = best[place]  # type: ignore[misc]
        joined = tuple(sorted(layers[place][i] + layers[place][j]))
        layers[place] = sorted([*(g for at, g in enumerate(layers[place]) if at not in (i, j)), joined])
        best[place] = _closest(values[place], layers[place], largest, least)
    return layers


def _closest(
    values: list[list[float]], groups: Groups, largest: int | None, least: int
) -> tuple[float, int, int] | None:
    """Mean similarity and places of the two groups that may be merged and are most alike; None where none may."""
    if len(groups) <= least:
        return None
    found = None
    for i, j in combinations(range(len(groups)), 2):
        first, second = groups[i], groups[j]
        if largest is not None and len(first) + len(second) > largest:
            continue
        mean = sum(values[a][b] for a in first for b in second) / (len(first) * len(second))
        if found is None or mean > found[0]:
            found = (mean, i, j)
    return found

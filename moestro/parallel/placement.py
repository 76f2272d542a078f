"""Which rank each expert lives on: pure functions of what the experts cost, nothing of processes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Placement:
    """`rank[e]` is the rank of expert e, of `n_ranks`. Every rank has at least one expert.

    Raises: ValueError for ranks that do not exist, or that would have no expert.
    """

    rank: tuple[int, ...]
    n_ranks: int

    def __post_init__(self) -> None:
        if not set(self.rank) <= set(range(self.n_ranks)):
            raise ValueError(f"placement {list(self.rank)}, allowed: ranks 0 to {self.n_ranks - 1}")
        if empty := sorted(set(range(self.n_ranks)) - set(self.rank)):
            raise ValueError(f"placement {list(self.rank)}: ranks {empty} of {self.n_ranks} have no expert")

    @cached_property
    def experts(self) -> tuple[tuple[int, ...], ...]:
        """The experts of every rank, ascending."""
        held: list[list[int]] = [[] for _ in range(self.n_ranks)]
        for expert, rank in enumerate(self.rank):
            held[rank].append(expert)
        return tuple(map(tuple, held))

    def per_rank(self, work: Sequence[float]) -> list[float]:
        """The sum of `work[e]` over the experts of each rank."""
        return [sum(work[expert] for expert in held) for held in self.experts]

    def imbalance(self, work: Sequence[float]) -> float:
        """Largest over mean of `per_rank`: how many times longer than needed the ranks wait for the busiest; 1 where
        there is no work."""
        each = self.per_rank(work)
        return max(each) * self.n_ranks / sum(each) if sum(each) else 1.0


class Strategy:
    """A way to place experts. `work[e]` is what expert e is expected to cost: rows times width where loads were
    measured (`tokens_times_width`), widths alone before that."""

    def __call__(self, work: Sequence[float], widths: Sequence[float], n_ranks: int) -> Placement:
        """Raises: ValueError where it cannot place these experts."""
        raise NotImplementedError


class EqualCount(Strategy):
    """Consecutive experts, as equally many a rank as there can be, whatever they cost: what libraries for equal experts
    do."""

    def __call__(self, work: Sequence[float], widths: Sequence[float], n_ranks: int) -> Placement:
        check(work, widths, n_ranks)
        return Placement(tuple(expert * n_ranks // len(work) for expert in range(len(work))), n_ranks)


class Greedy(Strategy):
    """Longest processing time first (Graham 1969): experts by falling work, each to the rank with the least so far,
    ties to the one with fewer experts, then to the lower. The busiest rank does at most 4/3 - 1/(3 n_ranks) times the
    work of that of the best placement."""

    def __call__(self, work: Sequence[float], widths: Sequence[float], n_ranks: int) -> Placement:
        check(work, widths, n_ranks)
        return dealt([(expert,) for expert in range(len(work))], work, n_ranks)


class Exact(Strategy):
    """The least possible work on the busiest rank, by branch and bound from `Greedy`'s placement; what it has after
    `nodes` partial placements where that does not suffice, which is never worse than greedy. Meant for tens of experts.
    """

    def __init__(self, nodes: int = 100_000) -> None:
        if nodes < 1:
            raise ValueError(f"exact placement nodes={nodes}, allowed: at least 1")
        self.nodes = nodes

    def __call__(self, work: Sequence[float], widths: Sequence[float], n_ranks: int) -> Placement:
        return self.solved(work, widths, n_ranks)[0]

    def solved(self, work: Sequence[float], widths: Sequence[float], n_ranks: int) -> tuple[Placement, bool]:
        """The placement, and whether it is proved to be the best."""
        search = _Search(work, Greedy()(work, widths, n_ranks), self.nodes)
        proved = search.place(0)
        return Placement(tuple(search.best), n_ranks), proved


class Blocks(Strategy):
    """Blocks of `together` consecutive experts stay on one rank, equally many blocks on each; blocks by falling work,
    each to the rank with the least so far that has room. With 2, MoDSE's pairs of complementary widths (Sun 2024,
    arXiv:2409.12210, section 3.3; `widths: pairs`) cost every rank the same number of parameters."""

    def __init__(self, together: int = 2) -> None:
        if together < 1:
            raise ValueError(f"blocks together={together}, allowed: at least 1")
        self.together = together

    def __call__(self, work: Sequence[float], widths: Sequence[float], n_ranks: int) -> Placement:
        check(work, widths, n_ranks)
        n_blocks = len(work) // self.together
        if len(work) % self.together or n_blocks % n_ranks:
            raise ValueError(
                f"{len(work)} experts in blocks of together={self.together} do not divide among {n_ranks} ranks"
            )
        blocks = [tuple(range(self.together * b, self.together * (b + 1))) for b in range(n_blocks)]
        return dealt(blocks, work, n_ranks, room=n_blocks // n_ranks)


class EverySize(Strategy):
    """Every rank has equally many experts of every width (all-size placement, MoHGE, arXiv:2604.23108), so that it
    holds the same parameters whatever the router prefers; within a width the busiest expert goes to the rank with the
    least work that has room for it."""

    def __call__(self, work: Sequence[float], widths: Sequence[float], n_ranks: int) -> Placement:
        check(work, widths, n_ranks)
        rank, held = [0] * len(work), [0.0] * n_ranks
        for width in sorted(set(widths), reverse=True):
            alike = [expert for expert, each in enumerate(widths) if each == width]
            if len(alike) % n_ranks:
                raise ValueError(
                    f"{len(alike)} experts of width {width:g} do not divide among {n_ranks} ranks: every rank is to "
                    "have equally many experts of every width"
                )
            room = [len(alike) // n_ranks] * n_ranks
            for expert in by_falling_work(alike, work):
                to = min((r for r in range(n_ranks) if room[r]), key=lambda r: (held[r], r))
                rank[expert], room[to], held[to] = to, room[to] - 1, held[to] + work[expert]
        return Placement(tuple(rank), n_ranks)


def tokens_times_width(load: Sequence[float], widths: Sequence[float]) -> list[float]:
    """What each expert costs: its rows times its hidden units. Widths of 0 cost nothing."""
    return [rows * width for rows, width in zip(load, widths, strict=True)]


def dealt(blocks: Sequence[Sequence[int]], work: Sequence[float], n_ranks: int, room: int | None = None) -> Placement:
    """Blocks of experts by falling work, each to the rank with the least work so far, of those with fewer than `room`
    blocks."""
    rank, held, count = [0] * len(work), [0.0] * n_ranks, [0] * n_ranks
    total = [sum(work[expert] for expert in block) for block in blocks]
    for block in by_falling_work(range(len(blocks)), total):
        to = min((r for r in range(n_ranks) if room is None or count[r] < room), key=lambda r: (held[r], count[r], r))
        held[to], count[to] = held[to] + total[block], count[to] + 1
        for expert in blocks[block]:
            rank[expert] = to
    return Placement(tuple(rank), n_ranks)


def by_falling_work(items: Sequence[int], work: Sequence[float]) -> list[int]:
    """The items of most work first, ties in their order."""
    return sorted(items, key=lambda item: (-work[item], item))


def check(work: Sequence[float], widths: Sequence[float], n_ranks: int) -> None:
    """Raises: ValueError for numbers that describe no experts, or too few of them for the ranks."""
    if len(work) != len(widths):
        raise ValueError(f"work of {len(work)} experts and widths of {len(widths)}")
    if not 1 <= n_ranks <= len(work):
        raise ValueError(f"n_ranks={n_ranks}, allowed: 1 to {len(work)}, the number of experts")
    if odd := [each for each in (*work, *widths) if not 0 <= each < float("inf")]:
        raise ValueError(f"work or width {odd[0]} of an expert, allowed: finite numbers of at least 0")


class _Search:
    """Depth-first branch and bound: experts by falling work, ranks by rising; ranks that are equally busy are one."""

    def __init__(self, work: Sequence[float], first: Placement, nodes: int) -> None:
        self.work, self.nodes, self.n_ranks = work, nodes, first.n_ranks
        self.order = by_falling_work(range(len(work)), work)
        self.rank, self.best = [0] * len(work), list(first.rank)
        self.held, self.count = [0.0] * self.n_ranks, [0] * self.n_ranks
        self.best_work = max(first.per_rank(work))
        self.bound = max(sum(work) / self.n_ranks, max(work))

    def place(self, depth: int) -> bool:
        """Place the experts from `depth` on in every way that could be better; whether none was left untried."""
        if depth == len(self.order):
            self.best, self.best_work = list(self.rank), max(self.held)
            return True
        if self.count.count(0) > len(self.order) - depth:
            return True
        expert, tried = self.order[depth], set()
        for rank in sorted(range(self.n_ranks), key=lambda r: (self.held[r], self.count[r])):
            state = self.held[rank], self.count[rank] == 0
            if self.best_work <= self.bound or self.held[rank] + self.work[expert] >= self.best_work:
                return True
            if state in tried:
                continue
            tried.add(state)
            self.nodes -= 1
            if self.nodes < 0:
                return False
            if not self._with(expert, rank, depth):
                return False
        return True

    def _with(self, expert: int, rank: int, depth: int) -> bool:
        before = self.held[rank]
        self.rank[expert], self.held[rank] = rank, before + self.work[expert]
        self.count[rank] += 1
        done = self.place(depth + 1)
        self.held[rank], self.count[rank] = before, self.count[rank] - 1
        return done

"""Which experts to remove: the subset of the least damage, by looking at all or by a genetic search.

MoE-I2 (arXiv:2411.01016), stage 1; population, generations and operators after a public re-implementation of it.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations, product

Subset = tuple[int, ...]
Damage = Callable[[Subset], float]


@dataclass(frozen=True)
class Found:
    """The best subsets, least damage first; the least damage known after every generation; whether all were looked
    at."""

    subsets: list[Subset]
    damages: list[float]
    history: list[float] = field(default_factory=list)
    exhaustive: bool = True


@dataclass(frozen=True)
class Genetic:
    """A genetic search: the best fifth survive, children take from the union of two of them, and each changes
    experts."""

    population: int = 100
    generations: int = 50
    survivors: float = 0.2
    mutation: float = 0.3

    def __post_init__(self) -> None:
        if self.population < 2 or self.generations < 1 or not 0 < self.survivors < 1 or not 0 <= self.mutation <= 1:
            raise ValueError(f"{self}, allowed: population from 2, generations from 1, shares between 0 and 1")


@dataclass(frozen=True)
class Choice:
    """How many experts are removed, the same number from each of the router's `groups` of consecutive experts."""

    n_experts: int
    n_removed: int
    groups: int = 1

    def __post_init__(self) -> None:
        if self.groups < 1 or self.n_experts % self.groups or self.n_removed % self.groups:
            raise ValueError(f"{self}: {self.groups} groups must divide both numbers")
        if not 0 <= self.n_removed < self.n_experts:
            raise ValueError(f"n_removed={self.n_removed}, allowed: 0 to {self.n_experts - 1}")

    @property
    def count(self) -> int:
        """Subsets there are."""
        return math.comb(self.n_experts // self.groups, self.n_removed // self.groups) ** self.groups

    def group(self, place: int) -> range:
        """The experts of one group."""
        size = self.n_experts // self.groups
        return range(place * size, (place + 1) * size)

    def all(self) -> Iterator[Subset]:
        """Every subset, in lexicographic order."""
        each = [combinations(self.group(place), self.n_removed // self.groups) for place in range(self.groups)]
        yield from (tuple(expert for part in parts for expert in part) for parts in product(*each))

    def of(self, pool: Sequence[int], draw: random.Random) -> Subset:
        """A random subset of a pool that holds enough of every group."""
        each = self.n_removed // self.groups
        parts = [draw.sample([e for e in pool if e in self.group(place)], each) for place in range(self.groups)]
        return tuple(sorted(expert for part in parts for expert in part))


def least_damage(
    damage: Damage,
    choice: Choice,
    n_best: int = 1,
    seed: int = 0,
    enumerable: int = 5000,
    genetic: Genetic | None = None,
) -> Found:
    """The `n_best` different subsets of the least damage that are found; ties go to the lexicographically first.

    Every subset is looked at where there are at most `enumerable`, none where nothing is removed. Else a genetic
    search, the same for the same seed; without `genetic`, that is an error, so that nobody mistakes one for the other.

    Raises: ValueError where the subsets are too many and no search is allowed.
    """
    if n_best < 1:
        raise ValueError(f"n_best={n_best}, allowed: at least 1")
    if choice.n_removed == 0:
        return Found([()], [0.0])
    known: dict[Subset, float] = {}

    def look(subset: Subset) -> float:
        if subset not in known:
            known[subset] = damage(subset)
        return known[subset]

    history: list[float] = []
    if choice.count <= enumerable:
        for subset in choice.all():
            look(subset)
    elif genetic is None:
        raise ValueError(
            f"{choice.count} subsets of {choice.n_removed} of {choice.n_experts} experts, allowed for an exact search: "
            f"{enumerable}; choose a genetic search or another criterion"
        )
    else:
        history = evolve(look, choice, genetic, random.Random(seed))
    best = sorted(known, key=lambda subset: (known[subset], subset))[:n_best]
    return Found(best, [known[subset] for subset in best], history, choice.count <= enumerable)


def evolve(look: Damage, choice: Choice, genetic: Genetic, draw: random.Random) -> list[float]:
    """Looks at generation after generation; returns the least damage known after each."""
    everyone = range(choice.n_experts)
    population = [choice.of(everyone, draw) for _ in range(genetic.population)]
    n_parents = max(2, round(genetic.survivors * genetic.population))
    history = []
    for _ in range(genetic.generations):
        parents = sorted(set(population), key=lambda subset: (look(subset), subset))[:n_parents]
        history.append(look(parents[0]))
        children = []
        while len(parents) + len(children) < genetic.population:
            first, second = (draw.choice(parents) for _ in range(2))
            child = choice.of(sorted({*first, *second}), draw)
            children.append(mutated(child, choice, genetic.mutation, draw))
        population = parents + children
    history.append(min(map(look, population)))
    return history


def mutated(subset: Subset, choice: Choice, chance: float, draw: random.Random) -> Subset:
    """At least one removed expert exchanged for one that was kept, of the same group; each further one by chance."""
    new = set(subset)
    certain = draw.choice(subset)
    for expert in subset:
        place = expert // (choice.n_experts // choice.groups)
        kept = [other for other in choice.group(place) if other not in new]
        if kept and (expert == certain or draw.random() < chance):
            new.remove(expert)
            new.add(draw.choice(kept))
    return tuple(sorted(new))

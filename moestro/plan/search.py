"""Every way to spread a recipe over so many ranks: which fit, which is fastest, and why others do not do."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from moestro.parallel import ParallelSettings
from moestro.plan.imbalance import EVEN, Balance, balance
from moestro.plan.machines import Machine
from moestro.plan.spread import Spread
from moestro.plan.timing import StepTime
from moestro.plan.workload import Workload

# Share of a device's memory that a plan may fill.
FULL = 0.95
# Zipf exponent of experts' popularity where no loads were measured: with 64 experts the busiest has 1.4 times the mean.
SKEW = 0.1


@dataclass(frozen=True)
class Found:
    """The spreads that fit, fastest first; those that do not, least over first; what could not be tried, with the
    reason; and the spread that the recipe itself asks for, where it is possible on so many ranks."""

    fitting: tuple[Spread, ...]
    too_large: tuple[Spread, ...]
    refused: dict[str, str]
    asked: Spread | None = None

    def best(self, n: int) -> list[Spread]:
        """The fastest of each mesh, up to `n` meshes."""
        return first_of_each_mesh(self.fitting, n)

    def nearest(self, n: int) -> list[Spread]:
        """Of meshes of which none fits the spread that is least over, up to `n`."""
        fits = {mesh(each) for each in self.fitting}
        return first_of_each_mesh([each for each in self.too_large if mesh(each) not in fits], n)


def mesh(spread: Spread) -> tuple[str, int, int, str]:
    """What of a spread says who holds what."""
    settings = spread.settings
    return settings.sharding, settings.replicas, settings.experts, settings.tables


def first_of_each_mesh(spreads: Sequence[Spread], n: int) -> list[Spread]:
    """The first spread of each mesh, in order, `n` at most."""
    firsts: dict[tuple, Spread] = {}
    for each in spreads:
        firsts.setdefault(mesh(each), each)
    return list(firsts.values())[:n]


def search(
    work: Workload,
    machine: Machine,
    world: int,
    skew: float = SKEW,
    measured: Mapping[str, Sequence[float]] | None = None,
) -> Found:
    """All divisions of `world` ranks into copies, shards and groups of experts, tables by rows and by columns,
    micro-batches and recomputation. The sum of a step's micro-batches stays the recipe's batch, of which every rank
    gets as much."""
    refused = dict(_refused(work, world))
    if "ranks" in refused:
        return Found((), (), refused)
    balances = {ranks: _balance(work, world, ranks, skew, measured) for ranks in expert_groups(work, world)}
    candidates = list(_candidates(work, machine, world, balances))
    fitting = [each for each in candidates if fits(each)]
    too_large = [each for each in candidates if not fits(each)]
    fitting.sort(key=lambda each: (StepTime(each).total, each.total))
    too_large.sort(key=lambda each: each.total)
    asked = as_recipe_says(work, machine, world, skew, measured)
    if isinstance(asked, str):
        return Found(tuple(fitting), tuple(too_large), {**refused, "recipe": asked})
    return Found(tuple(fitting), tuple(too_large), refused, asked)


def as_recipe_says(
    work: Workload, machine: Machine, world: int, skew: float, measured: Mapping[str, Sequence[float]] | None
) -> Spread | str:
    """The spread that the recipe's own settings ask for, or why it is impossible on so many ranks."""
    settings = work.settings
    try:
        settings.parallel.copies(world)
    except ValueError as error:
        return f"{error}"
    if settings.micro_batch % world:
        return (
            f"batch_size={settings.batch_size} in accumulate={settings.accumulate} micro-batches cannot be shared "
            f"equally by {world} ranks"
        )
    ranks = settings.parallel.experts
    if ranks > 1 and ranks not in expert_groups(work, world):
        return f"parallel experts={ranks}: its experts do not divide among so many of {world} ranks"
    own = _balance(work, world, ranks, skew, measured)
    return Spread(work, machine, world, settings.parallel, settings.accumulate, settings.recompute, own)


def fits(spread: Spread) -> bool:
    """Whether the fullest rank's memory holds what it must."""
    return spread.total <= FULL * spread.machine.memory


def expert_groups(work: Workload, world: int) -> list[int]:
    """Numbers of ranks that may hold all experts together: divisors of `world`, each rank with an expert of every
    bank."""
    most = 1 if work.unspread else min((len(mixture.widths) for mixture in work.mixtures), default=1)
    return [ranks for ranks in divisors(world) if ranks <= most]


def _refused(work: Workload, world: int) -> Iterator[tuple[str, str]]:
    batch = work.settings.batch_size
    if batch % world:
        least = world * -(-batch // world)
        fewer = max(ranks for ranks in divisors(batch) if ranks < world)
        yield (
            "ranks",
            f"{world} ranks cannot share the batch_size={batch} sequences of a step equally: give train.batch_size="
            f"{least}, which changes what is learned, or --gpus {fewer}",
        )
    if work.unspread and world > 1:
        yield "experts", f"{work.unspread[0]}: its experts cannot be spread over ranks"


def _balance(
    work: Workload, world: int, ranks: int, skew: float, measured: Mapping[str, Sequence[float]] | None
) -> Balance:
    if ranks == 1:
        return EVEN
    tokens = work.tokens / work.settings.accumulate / (world / ranks)
    return balance(work.mixtures, ranks, tokens, skew, measured)


def _candidates(work: Workload, machine: Machine, world: int, balances: Mapping[int, Balance]) -> Iterator[Spread]:
    shardings = list(shardings_of(world))
    tables = ("rows", "columns") if work.tables and world > 1 else ("rows",)
    micro = divisors(work.settings.batch_size // world)
    for (sharding, replicas), ranks, split, accumulate, recompute, reshard in product(
        shardings, balances, tables, micro, (False, True), (True, False)
    ):
        if world == 1 and not reshard:
            continue
        settings = ParallelSettings(sharding, replicas, reshard, ranks, tables=split)  # type: ignore[arg-type]
        yield Spread(work, machine, world, settings, accumulate, recompute, balances[ranks])


def shardings_of(world: int) -> Iterator[tuple[str, int]]:
    """(sharding, replicas) for so many ranks."""
    yield "full", 1
    for replicas in divisors(world):
        if 1 < replicas < world:
            yield "hybrid", replicas
    if world > 1:
        yield "none", 1


def divisors(n: int) -> list[int]:
    """Ascending."""
    low = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return low + [n // d for d in reversed(low) if d * d != n]

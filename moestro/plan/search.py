"""Every way to spread a recipe over so many ranks: which fit, which is fastest, and why others do not do."""

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


@dataclass(frozen=True)
class Found:
    """The spreads that fit, fastest first; those that do not, least over first; and what could not be tried, with the
    reason."""

    fitting: tuple[Spread, ...]
    too_large: tuple[Spread, ...]
    refused: dict[str, str]


def search(
    work: Workload,
    machine: Machine,
    world: int,
    skew: float = 0.3,
    measured: Mapping[str, Sequence[float]] | None = None,
) -> Found:
    """All divisions of `world` ranks into copies, shards and groups of experts, tables by rows and by columns,
    micro-batches and recomputation. The sum of a step's micro-batches stays the recipe's batch."""
    refused = dict(_refused(work, world))
    groups = [1] if "experts" in refused else expert_groups(work, world)
    balances = {ranks: _balance(work, world, ranks, skew, measured) for ranks in groups}
    candidates = [] if "ranks" in refused else list(_candidates(work, machine, world, balances))
    fitting = [each for each in candidates if each.total <= FULL * machine.memory]
    too_large = [each for each in candidates if each.total > FULL * machine.memory]
    fitting.sort(key=lambda each: (StepTime(each).total, each.total))
    too_large.sort(key=lambda each: each.total)
    return Found(tuple(fitting), tuple(too_large), refused)


def expert_groups(work: Workload, world: int) -> list[int]:
    """Numbers of ranks that may hold all experts together: divisors of `world`, each rank with an expert of every
    bank."""
    most = min((len(mixture.widths) for mixture in work.mixtures), default=1)
    return [ranks for ranks in divisors(world) if ranks <= most]


def _refused(work: Workload, world: int) -> Iterator[tuple[str, str]]:
    batch = work.settings.batch_size
    if world > batch:
        yield "ranks", f"a step of batch_size={batch} sequences leaves some of {world} ranks without one"
    if not work.mixtures:
        yield "experts", "no bank has experts that could lie on different ranks"
    elif work.unspread:
        yield "experts", f"{work.unspread[0]}: its experts cannot be spread over ranks"
    if not work.tables:
        yield "tables", "no tables train by rows (sparse_gradients: true)"


def _balance(
    work: Workload, world: int, ranks: int, skew: float, measured: Mapping[str, Sequence[float]] | None
) -> Balance:
    if ranks == 1:
        return EVEN
    tokens = work.tokens / work.settings.accumulate / (world / ranks)
    return balance(work.mixtures, ranks, tokens, skew, measured)


def _candidates(work: Workload, machine: Machine, world: int, balances: Mapping[int, Balance]) -> Iterator[Spread]:
    shardings = list(shardings_of(world))
    tables = ("rows", "columns") if work.tables else ("rows",)
    micro = [n for n in divisors(work.settings.batch_size) if work.settings.batch_size // n >= world]
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
    return [d for d in range(1, n + 1) if n % d == 0]

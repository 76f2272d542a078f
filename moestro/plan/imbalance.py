"""How unevenly ranks are loaded that hold experts of unequal widths: simulated, or from the loads of a run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moestro.parallel.placement import EqualCount, Greedy, Placement, Strategy, tokens_times_width
from moestro.plan.workload import Mixture

DRAWS = 16


@dataclass(frozen=True)
class Balance:
    """Largest over mean over the ranks of a group, 1 where all have the same: of `work` (rows times width) in a
    micro-batch, the mean over layers and draws, and of `parameters`, over all layers together."""

    work: float = 1.0
    parameters: float = 1.0


EVEN = Balance()


def even(ranks: int) -> tuple[float, ...]:
    """Equal shares."""
    return (1 / ranks,) * ranks


def popularity(n_experts: int, skew: float, draw: np.random.Generator) -> np.ndarray:
    """Probabilities of experts by Zipf's law, p of the r-th most popular in proportion to r^-skew, experts in random
    order; skew 0: all alike."""
    weight = np.arange(1, n_experts + 1, dtype=np.float64) ** -skew
    return draw.permutation(weight / weight.sum())


def simulated_loads(mixture: Mixture, tokens: float, skew: float, seed: int) -> list[list[float]]:
    """Rows of every expert in `DRAWS` micro-batches of so many tokens, each with experts of another popularity."""
    draw = np.random.default_rng(seed)
    rows = max(1, round(tokens * mixture.rows))
    shares = (popularity(len(mixture.widths), skew, draw) for _ in range(DRAWS))
    return [draw.multinomial(rows, share).astype(float).tolist() for share in shares]


def placed(mixture: Mixture, ranks: int, strategy: Strategy, load: Sequence[float] | None = None) -> Placement:
    """Where a strategy puts the experts, knowing their widths, or loads too."""
    width = expert_work(mixture)
    return strategy(width if load is None else tokens_times_width(load, width), width, ranks)


def expert_work(mixture: Mixture) -> Sequence[float]:
    """What a row costs at every expert: hidden units, or 1 where there are none."""
    return mixture.widths if any(mixture.widths) else (1.0,) * len(mixture.widths)


def balance(
    mixtures: Sequence[Mixture],
    ranks: int,
    tokens: float,
    skew: float,
    measured: Mapping[str, Sequence[float]] | None = None,
    seed: int = 0,
) -> Balance:
    """Of experts placed by width (`Greedy`), under loads drawn by Zipf's law; with the `measured` loads of a run, by
    name of the bank, placed by those and loaded so. Tokens are those of all ranks of the group together."""
    if ranks == 1 or not mixtures:
        return EVEN
    works: list[float] = []
    held = np.zeros(ranks)
    known: dict[tuple, tuple[list[float], list[float]]] = {}
    for mixture in mixtures:
        load = load_of(mixture, measured or {})
        key = (mixture.widths, mixture.parameters, mixture.rows, load and tuple(load))
        if key not in known:
            placement = placed(mixture, ranks, Greedy(), load)
            loads = simulated_loads(mixture, tokens, skew, seed) if load is None else [list(load)]
            each = [placement.imbalance(tokens_times_width(rows, expert_work(mixture))) for rows in loads]
            known[key] = each, placement.per_rank(mixture.parameters)
        works += known[key][0]
        held += known[key][1]
    return Balance(float(np.mean(works)), float(held.max() / held.mean()))


def load_of(mixture: Mixture, measured: Mapping[str, Sequence[float]]) -> Sequence[float] | None:
    """The measured loads of the layer that the bank belongs to; None where there are none."""
    return next((load for layer, load in measured.items() if mixture.name.startswith(f"{layer}.")), None)


def compared(mixture: Mixture, ranks: int, before: Sequence[float], after: Sequence[float]) -> dict[str, float]:
    """Largest over mean rows times width of a rank under the loads `after`, for experts placed by number, by width, and
    by the loads `before`."""
    work = tokens_times_width(after, expert_work(mixture))
    return {
        "equal count": placed(mixture, ranks, EqualCount()).imbalance(work),
        "by width": placed(mixture, ranks, Greedy()).imbalance(work),
        "by load": placed(mixture, ranks, Greedy(), before).imbalance(work),
    }

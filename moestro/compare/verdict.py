"""Which arm won at equal compute, and whether the spread over seeds allows saying so."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moestro.compare.numerals import NO_BREAK, PLUS_MINUS, decimals_for, is_number, mean_and_spread, percent, scientific
from moestro.upgrades import COMPARISON

RULE = (
    "An arm wins when its mean lies below that of every other arm by more than t standard errors of the "
    "difference, the standard error being sqrt(s1²/n1 + s2²/n2) with s the standard deviation over n seeds. "
    "t is Student's 95 % factor at Welch's degrees of freedom: close to 2 for many seeds; for equal spreads 2.8 with "
    "three seeds an arm and 4.3 with two. Anything less is called not separable from seed noise."
)


# Runs whose useful training FLOPs differ by less than this are said to have had equal compute.
EQUAL_WITHIN = 0.02


def run_status(run: Mapping) -> str:
    """`done`, `diverged` (finished without a finite loss), or whatever else the run says of itself."""
    status = run.get("status", "done" if run.get("final") else "unfinished")
    if status == "done" and not is_number((run.get("final") or {}).get("bpb")):
        return "diverged"
    return status


@dataclass(frozen=True)
class Cell:
    """All runs of one arm at one size and one budget."""

    arm: str
    size: str
    budget: float
    runs: tuple[Mapping, ...]
    unfinished: tuple[Mapping, ...] = ()

    @property
    def bpb(self) -> list[float]:
        return [run["final"]["bpb"] for run in self.runs]

    @property
    def mean(self) -> float:
        """Mean over the finished seeds; there must be one."""
        return statistics.fmean(self.bpb)

    @property
    def std(self) -> float | None:
        """Sample standard deviation over seeds; None with fewer than two."""
        return statistics.stdev(self.bpb) if len(self.runs) > 1 else None

    def average(self, field: str) -> float | None:
        """Mean of a run's figure over the finished seeds that recorded it."""
        values = [run[field] for run in self.runs if is_number(run.get(field))]
        return statistics.fmean(values) if values else None


@dataclass(frozen=True)
class Comparison:
    """How far `other` lies above the best arm, and whether that exceeds the spread (None: spread unknown)."""

    best: Cell
    other: Cell
    difference: float
    standard_error: float | None
    needed: float | None

    @property
    def separable(self) -> bool | None:
        if self.standard_error is None or self.needed is None:
            return None
        return self.difference > self.needed * self.standard_error


@dataclass(frozen=True)
class Verdict:
    """The arms at one budget, each at its best size, lowest bits per byte first."""

    budget: float
    ranked: tuple[Cell, ...]
    comparisons: tuple[Comparison, ...]

    @property
    def kind(self) -> str:
        """`empty`, `alone`, `won`, `tied` (within the spread of some arm) or `unknown` (a spread is missing)."""
        if not self.ranked:
            return "empty"
        if len(self.ranked) == 1:
            return "alone"
        answers = [comparison.separable for comparison in self.comparisons]
        if False in answers:
            return "tied"
        return "unknown" if None in answers else "won"


def check_format(results: Mapping) -> None:
    """Raises ValueError where `results` is not a results.json of the version written here."""
    if (found := COMPARISON.version_of(results, Path("results.json"))) != COMPARISON.version:
        raise ValueError(f"results.json is of format {found}, not upgraded to {COMPARISON.version}")
    sizes = [size["name"] for size in results["sizes"]]
    lost = {run["size"] for run in results["runs"]} - set(sizes)
    if lost:
        raise ValueError(f"results.json: runs at unknown sizes {sorted(map(str, lost))}; sizes: {sizes}")
    unknown = {run["arm"] for run in results["runs"]} - set(results["arms"])
    if unknown:
        raise ValueError(
            f"results.json: runs of unknown arms {sorted(map(str, unknown))}; arms: {list(results['arms'])}"
        )


def cells(results: Mapping) -> list[Cell]:
    """One cell for every arm at every (budget, size) at which anything was to run, in the order of the plan."""
    check_format(results)
    found: dict[tuple[float, str, str], tuple[list, list]] = {}
    for run in results["runs"]:
        finished, unfinished = found.setdefault((float(run["budget"]), run["size"], run["arm"]), ([], []))
        (finished if run_status(run) == "done" else unfinished).append(run)
    sizes = [size["name"] for size in results["sizes"]]
    grid = sorted({key[:2] for key in found}, key=lambda key: (key[0], sizes.index(key[1])))
    return [
        Cell(arm, size, budget, *map(tuple, found.get((budget, size, arm), ((), ()))))
        for budget, size in grid
        for arm in results["arms"]
    ]


def student_factor(freedom: float, level: float = 0.95) -> float:
    """t with P(|T| < t) = level for Student's distribution with `freedom` >= 1 degrees of freedom, not always whole.

    With T = sqrt(freedom) tan(a) the density of a is cos(a)^(freedom - 1), which is smooth and has a finite range.
    """
    freedom = min(freedom, 1e4)
    angles = np.linspace(0.0, math.pi / 2, 100_001)
    density = np.cos(angles) ** (freedom - 1)
    mass = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return float(math.sqrt(freedom) * np.tan(np.interp(level * mass[-1], mass, angles)))


def compare(best: Cell, other: Cell) -> Comparison:
    """The difference of two means with Welch's standard error, and the number of them that is asked for."""
    difference = other.mean - best.mean
    if len(best.runs) < 2 or len(other.runs) < 2:
        return Comparison(best, other, difference, None, None)
    parts = [statistics.variance(cell.bpb) / len(cell.runs) for cell in (best, other)]
    if sum(parts) == 0:
        return Comparison(best, other, difference, 0.0, student_factor(1))
    weights = [part**2 / (len(cell.runs) - 1) for part, cell in zip(parts, (best, other), strict=True)]
    factor = student_factor(sum(parts) ** 2 / sum(weights))
    return Comparison(best, other, difference, math.sqrt(sum(parts)), factor)


def judge(results: Mapping, budget: float) -> Verdict:
    """The verdict at one budget: each arm stands for itself with the size at which its mean is lowest."""
    finished = [cell for cell in cells(results) if cell.budget == float(budget) and cell.runs]
    best_size: dict[str, Cell] = {}
    for cell in finished:
        if cell.arm not in best_size or cell.mean < best_size[cell.arm].mean:
            best_size[cell.arm] = cell
    ranked = tuple(sorted(best_size.values(), key=lambda cell: cell.mean))
    return Verdict(float(budget), ranked, tuple(compare(ranked[0], other) for other in ranked[1:]))


def main_verdict(results: Mapping) -> Verdict:
    """The verdict at the largest budget at which most arms finished."""
    check_format(results)
    verdicts = [judge(results, budget) for budget in sorted(map(float, results["budgets"]))]
    if not verdicts:
        return Verdict(0.0, (), ())
    return max(verdicts, key=lambda verdict: (len(verdict.ranked), verdict.budget))


def common_decimals(results: Mapping) -> int:
    """Decimals for all bits per byte of one comparison, from the median spread, so that columns line up."""
    spreads = [cell.std for cell in cells(results) if cell.std is not None]
    return decimals_for(statistics.median(spreads)) if spreads else 3


def title_of(results: Mapping, arm: str) -> str:
    """What readers call an arm: its title, or its name where it has none."""
    return str(results["arms"][arm].get("title") or arm)


def _names(results: Mapping, arms: list[str]) -> str:
    titles = [title_of(results, arm) for arm in arms]
    return titles[0] if len(titles) == 1 else ", ".join(titles[:-1]) + " and " + titles[-1]


def _gap(comparison: Comparison) -> str:
    decimals = 4 if comparison.difference < 0.0095 else 3
    share = percent(comparison.difference / comparison.other.mean)
    return f"{comparison.difference:.{decimals}f} bits per byte ({share})"


def _seeds(verdict: Verdict) -> str:
    counts = {len(cell.runs) for cell in verdict.ranked}
    low, high = min(counts), max(counts)
    return f"{low} seeds" if low == high else f"{low} to {high} seeds"


def _equality(verdict: Verdict) -> str:
    spread = compute_spread(verdict)
    if spread is None or spread <= EQUAL_WITHIN:
        return "at equal compute"
    return f"at compute that is equal only within {percent(spread)}"


def headline(results: Mapping, verdict: Verdict) -> str:
    """One sentence: who won at equal compute, by how much, against which spread; or why nobody can be named."""
    if verdict.kind == "empty":
        return "No run has finished with a finite loss, so there is nothing to compare yet."
    best = verdict.ranked[0]
    name = _names(results, [best.arm])
    if verdict.kind == "alone":
        measured = mean_and_spread(best.mean, best.std)
        return f"Only {name} has finished runs ({measured} bits per byte): nothing to compare it with."
    second = verdict.comparisons[0]
    below = f"{_gap(second)} below {_names(results, [second.other.arm])}"
    equality = _equality(verdict)
    if verdict.kind == "won":
        spread = mean_and_spread(0.0, best.std).split(PLUS_MINUS)[-1]
        against = f"against a spread of ±{NO_BREAK}{spread} over {_seeds(verdict)}"
        return f"{name} won {equality}: {below}, the runner-up, {against}."
    if verdict.kind == "tied":
        tied = [best.arm, *(c.other.arm for c in verdict.comparisons if c.separable is False)]
        return (
            f"No single winner: {_names(results, tied)} are not separable from seed noise {equality}; "
            f"{name} has the lowest mean, {below}."
        )
    single = [cell.arm for cell in verdict.ranked if len(cell.runs) == 1]
    whose = "" if len(single) == len(verdict.ranked) else f" of {_names(results, single)}"
    return f"{name} came out lowest {equality}, {below}, but with one seed{whose} no spread is known: it may be noise."


def winner(results: Mapping) -> dict | None:
    """The `winner` entry of results.json: the arm with the lowest mean, and whether it may be called that."""
    verdict = main_verdict(results)
    if not verdict.ranked:
        return None
    best = verdict.ranked[0]
    return {
        "arm": best.arm,
        "size": best.size,
        "budget": best.budget,
        "bpb_mean": best.mean,
        "bpb_std": best.std,
        "seeds": len(best.runs),
        "verdict": verdict.kind,
        "sentence": headline(results, verdict),
    }


def compute_spread(verdict: Verdict) -> float | None:
    """Largest over smallest useful training FLOPs among the compared runs, minus one: 0 is exactly equal."""
    flops = [run["flops"] for cell in verdict.ranked for run in cell.runs if is_number(run.get("flops"))]
    return max(flops) / min(flops) - 1 if flops and min(flops) > 0 else None


def budget_text(budget: float) -> str:
    """How a budget is written: `4.5e12 FLOPs`."""
    return f"{scientific(budget)} FLOPs"


def unranked(results: Mapping, verdict: Verdict) -> list[str]:
    """Titles of the arms without a finished run at the verdict's budget."""
    ranked = {cell.arm for cell in verdict.ranked}
    return [title_of(results, arm) for arm in results["arms"] if arm not in ranked]

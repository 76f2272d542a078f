"""Figures of a finished run, of its loss or of what its probes answered: what effects are made of."""

from collections.abc import Callable
from statistics import fmean

import numpy as np

from bench.effects.effect import Run


def load(run: Run, at: int = -1) -> np.ndarray:
    """Fraction of tokens that use each expert, narrow to wide, mean over layers; `at` counts the saved states."""
    return np.mean([layer["load"] for layer in run["history"][at]["layers"]], axis=0)


def widths(run: Run) -> np.ndarray:
    """Width of every expert, narrow to wide."""
    return np.asarray(run["history"][0]["layers"][0]["widths"], dtype=np.float64)


def experts(run: Run, at: int = -1) -> float:
    """Experts a token uses, mean over layers."""
    return fmean(layer["experts"] for layer in run["history"][at]["layers"])


def saving(run: Run) -> float:
    """Active width over that of a homogeneous layer with as many experts a token, mean over layers."""
    layers = run["history"][-1]["layers"]
    return fmean(layer["width"] / (layer["experts"] * fmean(layer["widths"])) for layer in layers)


def preference(run: Run) -> float:
    """Correlation of load with width over the experts."""
    return float(np.corrcoef(load(run), widths(run))[0, 1])


def unevenness(run: Run) -> float:
    """Standard deviation of the load over experts, as a share of its mean."""
    return float(load(run).std() / load(run).mean())


def small_share(run: Run, at: int = -1) -> float:
    """Share of all rows that the narrower half of the experts computes."""
    return float(load(run, at)[: len(load(run)) // 2].sum() / load(run, at).sum())


def rise(run: Run) -> float:
    """How much the share of the narrower half rose from the untrained model to the end."""
    return small_share(run) - small_share(run, 0)


def late_rise(run: Run) -> float:
    """The same from a quarter of training to the end."""
    return small_share(run) - small_share(run, len(run["history"]) // 4)


def excess(run: Run, other: Run) -> float:
    """How far the first run's bits per byte lie above the second's, as a share of these."""
    return run["final"]["bpb"] / other["final"]["bpb"] - 1


def growth(run: Run) -> float:
    """Experts a token at the end, less those a quarter into training."""
    return experts(run) - experts(run, len(run["history"]) // 4)


def fewer(run: Run, other: Run) -> float:
    """Experts a token in the first run, less those in the second."""
    return experts(run) - experts(other)


def difficulty_of(where: str) -> Callable[[Run], float]:
    """The correlation of a token's loss with its active width; `where` as in the probe `difficulty`."""

    def correlation(run: Run) -> float:
        return run["difficulty"][where]["correlation"]

    return correlation


def kl(run: Run) -> float:
    """Unevenness (KL of the experts' shares of the gates from uniform, nats) of the trained model, mean over layers."""
    return fmean(layer["unevenness"] for layer in run["routing"])


def more_even(run: Run, other: Run) -> float:
    """Share of the second run's unevenness that the first does not have."""
    return 1 - kl(run) / kl(other)


def less_even(run: Run, other: Run) -> float:
    """Unevenness of the first run, less that of the second."""
    return kl(run) - kl(other)


def diminishing(few: Run, middle: Run, many: Run) -> float:
    """What the first step gains in bits per byte (as a share) less what the second gains."""
    return -excess(middle, few) + excess(many, middle)


def leanness(run: Run) -> float:
    """Active width of a token over that of even use of all experts, mean over layers."""
    return fmean(layer["width"] / (layer["experts"] * layer["mean_width"]) for layer in run["routing"])

"""Choosing what the paper leaves open, on a recorded trace: weights of the mix, thresholds; and what a trace says of
predictions."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from torch import Tensor

from moestro.offload.policies import Mix
from moestro.offload.replay import Setting, budget, replay
from moestro.offload.scorer import Thresholds, thresholds_for, unimportance
from moestro.offload.trace import Trace


def tune_mix(trace: Trace, setting: Setting, parts: int = 4, rounds: int = 2) -> tuple[Mix, float]:
    """The mix of least penalty on a trace, and that penalty.

    Every mix of weights in steps of 1 / parts is tried, the single policies among them, so that the result is never
    worse than any of them on this trace; then, `rounds` times, neighbours of the best at half the step before.
    """
    tried: dict[tuple[float, float, float, float], float] = {}

    def penalty(weights: tuple[float, float, float, float]) -> float:
        if weights not in tried:
            tried[weights] = replay(trace, replace(setting, policy=Mix(*weights))).penalty
        return tried[weights]

    best = min(_simplex(parts), key=penalty)
    step = 1 / parts
    for _ in range(rounds):
        step /= 2
        best = min([best, *_neighbours(best, step)], key=penalty)
    return Mix(*best), tried[best]


def _simplex(parts: int) -> Iterator[tuple[float, float, float, float]]:
    for a, b, c in product(range(parts + 1), repeat=3):
        if a + b + c <= parts:
            yield a / parts, b / parts, c / parts, (parts - a - b - c) / parts


def _neighbours(weights: tuple[float, ...], step: float) -> Iterator[tuple[float, float, float, float]]:
    """Moving `step` from one weight to another."""
    for source, target in product(range(4), repeat=2):
        if source != target and weights[source] >= step - 1e-12:
            moved = list(weights)
            moved[source] -= step
            moved[target] += step
            yield moved[0], moved[1], moved[2], moved[3]


def scores_of(trace: Trace) -> list[float]:
    """Unimportance of every choice of every token."""
    return [score for step in trace.steps for score in unimportance(step.weights).flatten().tolist()]


def profile_thresholds(trace: Trace, high: float = 0.67, low: float = 0.30) -> Thresholds:
    """Thresholds for these shares of choices in HIGH and LOW (`thresholds_for`)."""
    return thresholds_for(scores_of(trace), high, low)


def shares(trace: Trace, thresholds: Thresholds) -> dict[str, float]:
    """Share of all choices that ask for each precision."""
    scores = scores_of(trace)
    asked = [thresholds.precision(score) for score in scores]
    return {name.name.lower(): asked.count(name) / max(1, len(asked)) for name in sorted(set(asked), reverse=True)}


# what `tune_low_share` tries
LOW_SHARES = tuple(part / 20 for part in range(20))


def tune_low_share(trace: Trace, memory: int, setting: Setting) -> tuple[float, float]:
    """The part of `memory` (bytes, for slots) that LOW copies should have for a trace to move least bytes, in
    twentieths, and the bytes that it moves a pass; everything but its capacity is as in `setting`.

    Raises: ValueError where no share leaves room for an expert in HIGH, or the trace knows no LOW copies.
    """
    if trace.header.ratio >= 1:
        raise ValueError("recorded without LOW copies, of unknown size then: record it without --exact")
    moved: dict[float, float] = {}
    for share in LOW_SHARES:
        try:
            capacity = budget(trace.header, memory, share)
        except ValueError:
            break
        counts = replay(trace, replace(setting, capacity=capacity)).counts
        moved[share] = counts.moved / max(1, counts.passes)
    if not moved:
        raise ValueError(f"{memory:,} bytes do not hold an expert in HIGH beside slots for LOW copies")
    best = min(moved, key=lambda share: moved[share])
    return best, moved[best]


def prediction_accuracy(trace: Trace) -> list[dict[str, float]]:
    """For every distance ahead: share of tokens whose first expert was predicted among the chosen (`chosen`) and as the
    first (`first`), and share of all chosen experts predicted (`recall`), over tokens with a prediction."""
    found: list[list[float]] = []
    for steps in trace.sequences():
        for index, step in enumerate(steps):
            for distance, (ids, weights) in enumerate(step.ahead):
                at = index + distance + 1
                if at >= len(steps) or steps[at].layer != step.layer + distance + 1:
                    continue
                while len(found) <= distance:
                    found.append([0.0, 0.0, 0.0, 0.0])
                _compare(found[distance], steps[at].ids, steps[at].weights, ids, weights)
    return [
        {"distance": i + 1, "first": f / n, "chosen": c / n, "recall": r / n, "tokens": n}
        for i, (f, c, r, n) in enumerate(found)
        if n
    ]


def _compare(sums: list[float], ids: Tensor, weights: Tensor, predicted: Tensor, predicted_weights: Tensor) -> None:
    for real, w, guess, g in zip(ids, weights, predicted, predicted_weights, strict=True):
        first = int(real[w.argmax()])
        sums[0] += first == int(guess[g.argmax()])
        sums[1] += first in guess.tolist()
        sums[2] += len(set(real.tolist()) & set(guess.tolist())) / max(1, len(real))
        sums[3] += 1

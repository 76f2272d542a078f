"""IsoFLOP curves: loss against active parameters at one compute budget, as a parabola in log N."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from moestro.compare.numerals import is_number

Fit = dict[str, Any]


def fit_isoflop(points: Iterable[Sequence[Any]]) -> Fit | None:
    """bpb = a + b ln N + c (ln N)^2 by least squares over `points` of (active parameters, bpb, ...).

    Source: Hoffmann et al. 2022, arXiv:2203.15556, section 3.2. Points without a finite bpb are left out.
    None where fewer than three distinct sizes remain. `minimum_params` and `minimum_bpb` are the vertex where
    c > 0 and None otherwise; whether the vertex lies among the measured sizes is `minimum_status`'s answer.
    """
    usable = [(point[0], point[1]) for point in points if is_number(point[1])]
    if any(not is_number(size) or size <= 0 for size, _ in usable):
        raise ValueError(f"isoFLOP points need positive active parameters, got {[size for size, _ in usable]}")
    sizes = np.array([size for size, _ in usable], dtype=np.float64)
    if len(np.unique(sizes)) < 3:
        return None
    x = np.log(sizes)
    # Centred and scaled: x spans a few tenths around 15, its plain powers are nearly collinear.
    centre, scale = x.mean(), np.ptp(x)
    c_, b_, a_ = np.polyfit((x - centre) / scale, [bpb for _, bpb in usable], 2)
    c, slope = c_ / scale**2, b_ / scale
    b = slope - 2 * c * centre
    a = a_ - slope * centre + c * centre**2
    # Points on a straight line keep a curvature from rounding; its vertex is nowhere, and exp would overflow.
    bends = c_ > 1e-12 * max(abs(a_), abs(b_), 1.0) and abs(slope / c) < 200
    return {
        "a": float(a),
        "b": float(b),
        "c": float(c),
        "minimum_params": math.exp(centre - slope / (2 * c)) if bends else None,
        "minimum_bpb": float(a_ - b_**2 / (4 * c_)) if bends else None,
        "n_sizes": len(np.unique(sizes)),
    }


def parabola(fit: Mapping[str, Any], params: float) -> float:
    """bpb that `fit` predicts at `params` active parameters."""
    x = math.log(params)
    return fit["a"] + fit["b"] * x + fit["c"] * x * x


def minimum_status(points: Sequence[Sequence[Any]], fit: Mapping[str, Any] | None) -> str:
    """What may be said of the fitted minimum: `inside`, `below`, `above`, `none` (no upward bend), `unfitted`.

    `below` and `above` say that the vertex lies outside the measured sizes, where the parabola proves nothing.
    """
    if fit is None:
        return "unfitted"
    vertex = fit.get("minimum_params")
    if vertex is None or fit["c"] <= 0:
        return "none"
    sizes = [point[0] for point in points if is_number(point[1])]
    if vertex < min(sizes):
        return "below"
    return "above" if vertex > max(sizes) else "inside"

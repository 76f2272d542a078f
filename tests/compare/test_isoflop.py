"""The parabola in log N, and what may be said about its minimum."""

import math

import pytest

from moestro.compare.isoflop import fit_isoflop, minimum_status, parabola

SIZES = [0.4e6, 0.9e6, 1.7e6, 3.1e6, 6.5e6]


def fitted(points):
    fit = fit_isoflop(points)
    assert fit is not None
    return fit


def curve(size, c=0.11, at=1.5e6, lowest=1.9):
    return lowest + c * (math.log(size) - math.log(at)) ** 2


def test_recovers_a_known_parabola():
    fit = fitted([[size, curve(size), 0.01] for size in SIZES])
    assert fit["minimum_params"] == pytest.approx(1.5e6, rel=1e-6)
    assert fit["minimum_bpb"] == pytest.approx(1.9, abs=1e-9)
    assert fit["c"] == pytest.approx(0.11, rel=1e-6)
    assert fit["n_sizes"] == 5
    for size in (0.3e6, 1e6, 9e6):
        assert parabola(fit, size) == pytest.approx(curve(size), abs=1e-8)


def test_least_squares_not_interpolation():
    # Two points at one size, off by +-0.1, leave the curve through their mean unchanged.
    points = [[size, curve(size)] for size in SIZES]
    doubled = [[SIZES[2], curve(SIZES[2]) + 0.1], [SIZES[2], curve(SIZES[2]) - 0.1]]
    fit = fitted([p for p in points if p[0] != SIZES[2]] + doubled)
    assert fit["minimum_params"] == pytest.approx(1.5e6, rel=1e-6)


@pytest.mark.parametrize(
    "points",
    [
        [],
        [[1e6, 2.0, 0.1]],
        [[1e6, 2.0], [2e6, 1.9]],
        [[1e6, 2.0], [2e6, 1.9], [2e6, 1.8]],
        [[1e6, 2.0], [2e6, 1.9], [3e6, None]],
        [[1e6, 2.0], [2e6, 1.9], [3e6, float("nan")]],
    ],
)
def test_fewer_than_three_sizes_have_no_fit(points):
    assert fit_isoflop(points) is None
    assert minimum_status(points, None) == "unfitted"


def test_sizes_must_be_positive():
    with pytest.raises(ValueError, match=r"positive active parameters, got \[0, "):
        fit_isoflop([[0, 2.0], [1e6, 1.9], [2e6, 1.8]])


@pytest.mark.parametrize(("at", "status"), [(1.5e6, "inside"), (0.38e6, "below"), (6.8e6, "above")])
def test_where_the_minimum_lies(at, status):
    points = [[size, curve(size, at=at), None] for size in SIZES]
    assert minimum_status(points, fit_isoflop(points)) == status


@pytest.mark.parametrize("c", [-0.1, 0.0])
def test_no_minimum_without_upward_bend(c):
    points = [[size, curve(size, c=c) - 0.05 * math.log(size), None] for size in SIZES]
    fit = fitted(points)
    assert fit["minimum_params"] is None and fit["minimum_bpb"] is None
    assert minimum_status(points, fit) == "none"

"""Schedules against their closed forms."""

import math
from typing import Any

import pytest

from moestro.train import WSD, Constant, Cosine

UNKNOWN: Any = "square"
PROGRESS = [i / 40 for i in range(41)]


@pytest.mark.parametrize("schedule", [Constant(warmup=0.2), Cosine(warmup=0.2), WSD(warmup=0.2)])
def test_warmup_is_linear_from_zero_to_one(schedule):
    assert schedule(0.0) == 0.0
    assert schedule(0.05) == pytest.approx(0.25)
    assert schedule(0.1) == pytest.approx(0.5)
    assert schedule(0.2) == pytest.approx(1.0)


def test_without_warmup_the_first_factor_is_one():
    assert [s(0.0) for s in (Constant(), Cosine(warmup=0.0), WSD(warmup=0.0))] == [1.0, 1.0, 1.0]


def test_constant_stays():
    assert all(Constant()(p) == 1.0 for p in PROGRESS)


@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_cosine_closed_form(final):
    schedule = Cosine(warmup=0.25, final=final)
    for p in PROGRESS[10:]:
        expected = final + (1 - final) * 0.5 * (1 + math.cos(math.pi * (p - 0.25) / 0.75))
        assert schedule(p) == pytest.approx(expected, abs=1e-12)
    assert schedule(1.0) == pytest.approx(final)


@pytest.mark.parametrize(("shape", "halfway"), [("linear", 0.5), ("sqrt", 1 - math.sqrt(0.5))])
def test_wsd_is_flat_then_falls_to_final(shape, halfway):
    schedule = WSD(warmup=0.1, decay=0.4, final=0.2, shape=shape)
    assert all(schedule(p) == 1.0 for p in PROGRESS if 0.1 <= p <= 0.6)
    assert schedule(0.8) == pytest.approx(0.2 + 0.8 * halfway)
    assert schedule(1.0) == pytest.approx(0.2)


def test_wsd_without_decay_never_falls():
    assert WSD(warmup=0.0, decay=0.0)(1.0) == 1.0


@pytest.mark.parametrize("kind", [Constant, Cosine, WSD])
def test_warmup_in_steps_is_the_same_share_of_the_budget(kind):
    in_steps, as_share = kind(warmup=10), kind(warmup=0.2)
    assert [in_steps(p, 1 / 50) for p in PROGRESS] == pytest.approx([as_share(p, 1 / 50) for p in PROGRESS])


def test_a_warmup_longer_than_the_budget_only_rises():
    factors = [Cosine(warmup=1000)(p, 1 / 50) for p in PROGRESS]
    assert factors == pytest.approx(PROGRESS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Cosine(warmup=-0.1),
            r"schedule warmup=-0\.1: allowed is a share of the budget in \[0, 1\) or a whole",
        ),
        (lambda: Constant(warmup=2.5), r"schedule warmup=2\.5: allowed"),
        (lambda: Cosine(final=1.5), r"schedule final=1\.5: allowed is 0 to 1"),
        (lambda: WSD(decay=1.2), r"schedule decay=1\.2: allowed is 0 to 1"),
        (lambda: WSD(warmup=0.5, decay=0.6), r"warmup=0\.5 and decay=0\.6 overlap"),
        (lambda: WSD(shape=UNKNOWN), r"schedule shape='square': allowed are 'linear', 'sqrt'"),
    ],
)
def test_impossible_schedules_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()

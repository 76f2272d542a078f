"""The study of the generalization bound: its figures on made-up curves, and that it runs."""

from dataclasses import replace

import pytest
from rich.console import Console

from bench.effects import generalization as study
from bench.effects.study import Work
from moestro.compare.board import Board
from moestro.evaluate.generalization import sparse_factor


def run(train: list[float], gap: list[float], **figures: float) -> dict:
    points = zip(train, gap, strict=True)
    curve = [{"step": i, "train": [t, t / 8], "held_out": [t + g, t / 8 + g / 4]} for i, (t, g) in enumerate(points)]
    return {"gaps": {"curve": curve, **figures}}


SLOW = run([4.0, 3.0, 2.0], [0.0, 0.1, 0.4], s_paper=1.0, m=100, router=2.0)
FAST = run([3.0, 1.0, 0.5], [0.3, 1.1, 2.0], s_paper=2.0, m=25, router=3.0)


def test_gaps_are_compared_at_the_loss_that_all_reach() -> None:
    assert study.matched((SLOW, FAST)) == pytest.approx([0.4, 0.7])
    assert study.errors((SLOW, FAST)) == pytest.approx([0.1, 0.175])
    assert study.at_level(FAST["gaps"]["curve"], 3.5) == pytest.approx(0.3)
    assert study.at_level(SLOW["gaps"]["curve"], 2.5) == pytest.approx(0.25)
    assert study.last((SLOW, FAST)) == pytest.approx([0.4, 2.0])
    assert study.best((SLOW, FAST)) == pytest.approx([0.4, 1.1])


def test_slopes_and_ranks() -> None:
    assert study.slope(study.of("s_paper"))(SLOW, FAST) == pytest.approx(0.3)
    assert study.slope(study.inverse_root)(SLOW, FAST) == pytest.approx(3.0)
    assert study.ranks(study.of("s_paper"))(SLOW, FAST) == pytest.approx(1.0)
    assert study.ranks(study.of("m"))(SLOW, FAST) == pytest.approx(-1.0)
    assert study.growth(SLOW, FAST) == pytest.approx(0.7 / 0.4)
    assert study.beyond_the_bound(SLOW, FAST) == pytest.approx(0.7 / 0.4 / 1.5)


@pytest.mark.slow
def test_the_study_runs_and_probes_what_the_bound_is_made_of(tmp_path) -> None:
    arms = {name: study.STUDY.arms[name] for name in ("k1", "t4", "more-text")}
    small = {**study.STUDY.common, "model.d_model": 8, "model.attention.n_heads": 2, "train.batch_size": 4}
    quick = replace(study.STUDY, arms=arms, common=small, budget=2e10, checkpoints=3).quick()
    work = Work(replace(quick, seeds=(0,)), tmp_path / "study", tmp_path)
    work.train(workers=1, board=Board(Console(quiet=True)))
    found = {job.arm: job.summary["gaps"] for job in work.jobs}
    assert found["more-text"]["m"] > found["k1"]["m"] == found["t4"]["m"]
    assert found["k1"]["s_paper"] == pytest.approx(sparse_factor(16, 1, found["k1"]["m"]))
    assert found["t4"]["router"] < found["k1"]["router"]
    for gaps in found.values():
        assert len(gaps["curve"]) >= 3
        assert all(0 < point["train"][0] < 7 and 0 < point["held_out"][1] <= 1 for point in gaps["curve"])
    names = {arm for effect in study.EFFECTS for arm in effect.arms}
    assert names == set(study.STUDY.arms)

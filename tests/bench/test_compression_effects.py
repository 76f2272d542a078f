"""The study of compression: its figures on made-up answers, and that its probe answers for all of them."""

import pytest

from bench.effects import compression as study
from tests.bench.small_study import small_runs

RUN = {"compression": {"whole": 10.0, "reap, 2 of 8": 12.0, "int4": 11.0, "both": 14.0, "similarity": 0.4}}


def test_costs_and_comparisons_are_shares_of_perplexity() -> None:
    assert study.cost("reap, 2 of 8")(RUN) == pytest.approx(0.2)
    assert study.against("reap, 2 of 8", "int4")(RUN) == pytest.approx(12 / 11 - 1)
    assert study.adding("both", "reap, 2 of 8", "int4")(RUN) == pytest.approx(0.4 / 0.3)
    assert study.likeness(RUN) == 0.4


def test_every_effect_has_a_number_of_its_own() -> None:
    numbers = [effect.id for effect in study.EFFECTS]
    assert len(set(numbers)) == len(numbers)
    assert {arm for effect in study.EFFECTS for arm in effect.arms} == set(study.STUDY.arms)


@pytest.mark.slow
def test_the_study_runs_and_answers_for_every_effect(tmp_path) -> None:
    runs = small_runs(study.STUDY, tmp_path)
    for effect in study.EFFECTS:
        assert len(effect.row("pages", runs)["values"]) == 1
    for run in runs[0].values():
        assert all(value > 1 for way, value in run["compression"].items() if way != "similarity")

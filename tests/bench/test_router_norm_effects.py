"""The study of provable pruning: its figures on made-up answers, and that its probe answers for all of them."""

import pytest
import torch

from bench.effects import router_norms as study
from bench.effects.router_norm_probes import distances
from moestro.compress.router_norms import router_norm_changes
from moestro.compress.source import RunSource
from tests.bench.small_study import small_runs

RUN = {
    "compression": {"whole": 10.0, "whole, trained on": 8.0, "change, 2 of 8": 13.0, "change, trained on, 2 of 8": 9.0}
}


def test_the_gap_is_beside_the_whole_model_trained_on_as_long() -> None:
    assert study.gap("2 of 8")(RUN) == pytest.approx((9 / 8 - 1) - (13 / 10 - 1))


def test_every_effect_has_a_number_of_its_own() -> None:
    numbers = [effect.id for effect in study.EFFECTS]
    assert len(set(numbers)) == len(numbers)
    assert {arm for effect in study.EFFECTS for arm in effect.arms} | {"general"} == set(study.STUDY.arms)


def test_the_norm_of_the_change_is_another_thing_than_the_change_of_norms() -> None:
    rows = {"before": torch.tensor([[3.0, 4.0], [0.0, 1.0]]), "after": torch.tensor([[6.0, 8.0], [0.0, -1.0]])}

    class Folder:
        path, family, extra_layers, moe_layers = "", RunSource.family, (), (0,)

        def __init__(self, when: str) -> None:
            self.when = when

        def router_tensors(self, layer):
            return {"weight": "router"}

        def read(self, name):
            return rows[self.when]

    before, after = Folder("before"), Folder("after")
    assert distances(before, after)[0].tolist() == [5.0, 2.0]
    assert router_norm_changes(before, after)[0].tolist() == [5.0, 0.0]


@pytest.mark.slow
def test_the_study_runs_and_answers_for_every_effect(tmp_path) -> None:
    runs = small_runs(study.STUDY, tmp_path)
    for effect in study.EFFECTS:
        assert len(effect.row("pages", runs)["values"]) == 1
    found = runs[0]["tuned"]["compression"]
    assert all(value > 1 for value in found.values())
    assert found["change, 2 of 8"] != found["change, zeroed, 2 of 8"]

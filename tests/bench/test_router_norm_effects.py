"""The study of provable pruning: its figures on made-up answers, and that its probe answers for all of them."""

from dataclasses import replace

import pytest
import torch
from rich.console import Console

from bench.effects import router_norms as study
from bench.effects.router_norm_probes import distances
from bench.effects.study import Work
from moestro.compare.board import Board
from moestro.compress.router_norms import router_norm_changes
from moestro.compress.source import RunSource

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
    small = {**study.STUDY.common, "model.d_model": 32, "model.attention.n_heads": 2, "train.batch_size": 4}
    quick = replace(study.STUDY, common=small, budget=2e10).quick()
    work = Work(replace(quick, seeds=(0,)), tmp_path / "study", tmp_path)
    work.train(workers=1, board=Board(Console(quiet=True)))
    runs = {0: {job.arm: job.summary for job in work.jobs}}
    for effect in study.EFFECTS:
        assert len(effect.row("pages", runs)["values"]) == 1
    found = runs[0]["tuned"]["compression"]
    assert all(value > 1 for value in found.values())
    assert found["change, 2 of 8"] != found["change, zeroed, 2 of 8"]

"""The pieces of bench/offload.py and bench/effects/offload.py that need no large model."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bench.effects.offload import EFFECTS, STUDY
from bench.effects.offload_probes import replayed
from bench.effects.study import Work
from bench.limits import limited
from bench.small_mixtral import drawn, library_text
from moestro.compare.board import Board
from moestro.formats import Checkpoint
from tests.offload.traces import made_up

SIZES = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "num_local_experts": 4}


def test_a_drawn_checkpoint_is_whole(tmp_path: Path) -> None:
    checkpoint = Checkpoint(drawn(tmp_path / "model", SIZES))
    assert checkpoint.moe_layers == (0, 1) and checkpoint.n_experts(1) == 4
    first = checkpoint.expert(0, 0)
    assert first.gate.shape == (8, 16) and first.down.shape == (16, 8) and first.gate.dtype == torch.bfloat16
    assert not torch.equal(first.gate, checkpoint.expert(0, 1).gate)
    assert int(library_text().max()) < 256


def test_a_command_under_a_limit_answers_or_says_why() -> None:
    assert limited(["-c", "print('x'); print('{\"a\": 1}')"], 1 << 31) == {"a": 1}
    greedy = "from bench.limits import enter; enter(); x = bytearray(1 << 30); print('{}')"
    with pytest.raises(RuntimeError, match="ended with"):
        limited(["-c", greedy], 1 << 28)


def test_what_a_trace_says_for_the_effects() -> None:
    found = replayed(made_up(tokens=20, depth=3, n_layers=4, size=(64, 16)))
    assert found["mix"] <= min(found["single"].values()) and set(found["lfu"]) == {"sequence", "model"}
    nats = {"exact": 2.0, "mixed": 2.01, "skip 0.6": 2.3, "skip 0.3": 2.7, "int4 0.6": 2.1, "int2 0.6": 2.2}
    run = {"offload": {**found, "nats": nats}}
    numbers = [effect.id for effect in EFFECTS]
    assert len(set(numbers)) == len(numbers) and {arm for e in EFFECTS for arm in e.arms} == set(STUDY.arms)
    value = {effect.id: effect.value(*[run] * len(effect.arms)) for effect in EFFECTS}
    assert value["M3"] <= 1 and value["M1"] == found["chosen"][0] - found["chosen"][1] and value["B1"] == 1
    assert [value[f"H{i}"] for i in (5, 6, 7)] == pytest.approx([0.2, 0.1, 0.4])
    assert value["M8"] == pytest.approx(math.exp(0.01))


@pytest.mark.slow
def test_the_study_runs_and_answers_for_every_effect(tmp_path: Path) -> None:
    quick = replace(STUDY, common={**STUDY.common, "model.d_model": 32, "train.batch_size": 4}, budget=2e10).quick()
    work = Work(replace(quick, seeds=(0,)), tmp_path / "study", tmp_path)
    work.train(workers=1, board=Board(Console(quiet=True)))
    runs = {0: {job.arm: job.summary for job in work.jobs}}
    assert all(len(effect.row("pages", runs)["values"]) == 1 for effect in EFFECTS)

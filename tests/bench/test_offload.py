"""The pieces of bench/offload.py and bench/effects/offload.py that need no large model."""

from pathlib import Path

import pytest
import torch

from bench.effects.offload import EFFECTS, replayed
from bench.limits import limited
from bench.small_mixtral import drawn, library_text
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
    found = replayed(made_up(tokens=20, size=(64, 16)))
    assert found["mix"] <= min(found["single"].values()) and set(found["lfu"]) == {"sequence", "model"}
    by_id = {effect.id: effect for effect in EFFECTS}
    assert by_id["B"].value(found) <= 1 and by_id["A"].value(found) == found["chosen"][0] - found["chosen"][1]

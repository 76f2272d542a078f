"""Slots on a GPU: copies on a stream of their own, the same bits as in the GPU's memory."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from moestro.offload.codecs import CODECS
from moestro.offload.running import generate
from moestro.offload.scorer import Thresholds
from moestro.offload.session import Plan, Session
from tests.hf.families import some_tokens
from tests.offload.models import memory_for, tiny_folder

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("host", [False, True], ids=["files", "pinned"])
@pytest.mark.parametrize("experts", [1, 5])
def test_generation_on_the_device_to_the_bit(host: bool, experts: int, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", num_hidden_layers=3, num_local_experts=6, dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager", dtype="auto").cuda().eval()
    prompt = some_tokens(1, 6)[0]
    want = model.generate(prompt[None].cuda(), max_new_tokens=24, do_sample=False)[0, 6:].cpu()
    plan = Plan(memory_for(folder, experts, depth=2), depth=2, host=host)
    with Session(folder, plan, "cuda", poison=True) as session:
        for _ in range(3):
            assert torch.equal(generate(session, prompt, 24).tokens, want)
        assert session.loader.counts.misses_high > 6


def test_mixed_precision_and_cooperation_stay_finite(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", num_local_experts=6, dtype=torch.bfloat16)
    plan = Plan(memory_for(folder, 4), CODECS["int4"], 0.3, Thresholds(0.3, 1.0), depth=1, host=True, cooperative=True)
    with Session(folder, plan, "cuda", store=tmp_path / "low", poison=True) as session, session.running():
        for i in range(12):
            assert torch.isfinite(session.model(some_tokens()[:, i : i + 1].cuda()).logits).all()
        assert session.loader.counts.in_place > 0 < session.loader.counts.hits

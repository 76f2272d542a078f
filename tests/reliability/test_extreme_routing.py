"""Routing at its extremes through a whole training: one expert gets every token, one none, a layer no token at all.

Nothing breaks, the routing report says so, what never computes keeps its weights, and a killed run continues exactly.
"""

import pytest
import torch

from moestro import FFNBank, LoadBalance, MoELayer, ParameterPenalty, ScoredRouter
from moestro.evaluate import routing_report
from moestro.routers import BiasedRouter, LinearScore, ReLU
from moestro.train import train
from tests.reliability.test_non_finite import Broken
from tests.train.test_loop import lines_of
from tests.train.test_resume import Killed, remembered, require_equal_runs
from tests.train.tiny import WIDTH, Counting, OptimSettings, tiny_model, tiny_settings

FAR = 1e6


def biased(top_k, biases):
    """A router whose choice is not the tokens'."""
    router = BiasedRouter(LinearScore(WIDTH, 4), top_k)
    router.bias.copy_(torch.tensor(biases))
    return router


def silent():
    """A router that gives no token any expert, and stays so: no gradient reaches scores that chose nothing."""
    router = ScoredRouter(LinearScore(WIDTH, 4), ReLU(2))
    torch.nn.init.zeros_(router.score.weight)
    return router


# (router, which experts compute, share of experts without a row)
ROUTERS = {
    "all tokens to one expert": (lambda: biased(1, [0.0, 0.0, FAR, 0.0]), {2}, 0.75),
    "an expert that is never used": (lambda: biased(2, [0.0, -FAR, 0.0, 0.0]), {0, 2, 3}, 0.25),
    "a layer without tokens": (silent, set(), 1.0),
}


def model_of(kind):
    model = tiny_model(kinds=("moe",))
    model.blocks[0].ffn = MoELayer(ROUTERS[kind][0](), [FFNBank(WIDTH, [2, 4, 6, 3])])
    return model


def weights_by_expert(model):
    """{expert: all its numbers, in one tensor}"""
    bank = model.blocks[0].ffn.bank
    parts = {e: [p.detach()[rows].flatten() for p, rows in bank.weights_of(e)] for e in range(bank.n_experts)}
    return {expert: torch.cat(found).clone() for expert, found in parts.items()}


def trained(kind, precision, folder, dies_at=None):
    """The model after twelve steps, and its last metrics."""
    model = model_of(kind)
    settings = tiny_settings(12, precision=precision, optim=OptimSettings(lr=0.01, weight_decay=0.0), keep_last=9)
    objectives = [("balance", 0.01, LoadBalance()), ("widths", 0.01, ParameterPenalty())]
    data = Broken(dies_at=dies_at)
    return model, train(model, data, settings, objectives, [], folder)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ROUTERS)
def test_it_trains_is_reported_and_continues_exactly(kind, precision, tmp_path):
    start = weights_by_expert(model_of(kind))
    model, result = trained(kind, precision, tmp_path / "whole")
    lines = [line for line in lines_of(tmp_path / "whole") if "loss" in line]
    assert len(lines) == 12 and result["skipped"] == 0 and lines[-1]["loss"] < lines[0]["loss"]
    _, used, dead = ROUTERS[kind]
    (figures,) = routing_report(model, Counting().val_batches(4), precision=precision).values()
    assert figures["dead"] == dead and {e for e, load in enumerate(figures["load"]) if load} == used
    for expert, now in weights_by_expert(model).items():
        assert torch.equal(now, start[expert]) == (expert not in used), expert
    assert all(value.isfinite().all() for value in remembered(tmp_path / "whole", 12).values())
    with pytest.raises(Killed):
        trained(kind, precision, tmp_path / "killed", dies_at=7)
    trained(kind, precision, tmp_path / "killed")
    require_equal_runs(tmp_path / "killed", tmp_path / "whole", 12)


def test_one_expert_for_all_is_as_uneven_as_can_be(tmp_path):
    model, _ = trained("all tokens to one expert", "fp32", tmp_path)
    (figures,) = routing_report(model, Counting().val_batches(4)).values()
    assert figures["unevenness"] == pytest.approx(torch.tensor(4.0).log().item())
    assert figures["usage"] == 0.25 and figures["experts_per_token"]["mean"] == 1

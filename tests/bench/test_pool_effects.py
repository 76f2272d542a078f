"""What the study of routing systems trains of DynMoE and dynamic routing, and its probe of pools of experts."""

import pytest
import torch

from bench.effects.pool_probes import mean_cosine, pool
from bench.effects.routing import STUDY
from bench.effects.systems import dynamic_routing, dynmoe
from moestro.model import Attention, Block, Transformer
from moestro.routers import LinearScore, ScoredRouter, TopK
from moestro.train import AdaptiveExperts
from tests.bench.test_routing_effects import model
from tests.train.test_adaptive_experts import layer
from tests.train.tiny import VOCABULARY, WIDTH, Counting


class Finished:
    """Stands for a finished run: a model of two layers with thresholds, the second of which serves nobody."""

    final_tokens = 72

    def model(self) -> Transformer:
        torch.manual_seed(0)
        layers = [layer(0, threshold=-1.01), layer(1, threshold=1.01, first_available=2)]
        return Transformer(VOCABULARY, WIDTH, [Block(WIDTH, Attention(WIDTH, 2), each) for each in layers]).eval()

    def held_out(self, tokens: int):
        return Counting().val_batches(4)


def test_the_probe_sees_who_would_be_unserved_in_training() -> None:
    first, second = pool(Finished())
    assert (first["unserved"], second["unserved"]) == (0, 1)
    assert (first["available"], second["available"]) == (3, 2)
    assert first["cosine"] < 1e-6


def test_the_cosine_is_the_mean_over_pairs_of_available_experts() -> None:
    router = ScoredRouter(LinearScore(2, 4), TopK(1), first_available=3)
    with torch.no_grad():
        router.score.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, -3.0], [2.0, 2.0], [9.0, 9.0]]))
    assert mean_cosine(router) == pytest.approx((0 + 2 * 0.5**0.5) / 3)
    router.set_available(torch.tensor([True, False, False, False]))
    assert mean_cosine(router) == 0


def test_arms_differ_in_what_they_are_named_for() -> None:
    objectives = {arm: [name for name, _, _ in model(arm)[1][1]] for arm in STUDY.arms}
    assert len(objectives["dynmoe"]) == 4
    assert set(objectives["dynmoe"]) - set(objectives["dynmoe-wasteful"]) == {"gate_efficiency"}
    assert set(objectives["dynmoe"]) - set(objectives["dynmoe-alike"]) == {"router_diversity"}
    assert isinstance(model("dynmoe")[1][2][0], AdaptiveExperts) and not model("dynmoe-static")[1][2]
    assert "router_entropy" in objectives["top-p-0.4"] and "router_entropy" not in objectives["top-p-beta-0"]
    stored = {
        prefix: {sum(p.numel() for moe in model(arm)[0].moe_layers().values() for p in moe.bank.parameters())
                 for arm in STUDY.arms if arm.startswith(prefix)}
        for prefix in ("dynmoe", "top-p")
    }  # fmt: skip
    assert all(len(sizes) == 1 for sizes in stored.values())


def test_figures_are_differences() -> None:
    def run(bpb: float = 1.0, **parts) -> dict:
        return {"final": {"bpb": bpb}, **parts}

    layers = [{"available": 5, "unserved": 0.5}, {"available": 8, "unserved": 0.25}]
    assert dynmoe.pool_range(run(pool=layers)) == 3
    assert dynmoe.less("unserved")(run(pool=layers), run(pool=layers[1:])) == 0.125
    assert dynmoe.over_best(run(3.0), run(2.0), run(4.0)) == 0.5
    history = [{"layers": [{"experts": 7.0}] * 2}, {"layers": [{"experts": 3.0}, {"experts": 2.0}]}]
    traced = run(history=history)
    assert (dynamic_routing.at_start(traced), dynamic_routing.since_start(traced), dynamic_routing.earlier(traced)) == (
        7.0,
        -4.5,
        1.0,
    )

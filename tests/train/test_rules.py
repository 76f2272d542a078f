"""Query-norm statistics: pooled over micro-batches, applied once a step."""

import pytest
import torch

from moestro import MoELayer, ProductKeyRouter
from moestro.routers.query_norm import BatchQueryNorm
from moestro.train import QueryNormStatistics, Rule, train
from moestro.train.pooling import pooled
from tests.tolerances import FLOAT64
from tests.train.tiny import Counting, peer, tiny_model, tiny_settings


def test_pooled_statistics_are_those_of_the_whole_batch():
    x = torch.randn(30, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 5
    parts = [(part.mean(0), part.var(0, correction=0), len(part)) for part in x.split([7, 20, 3])]
    mean, variance = pooled(parts)
    torch.testing.assert_close(mean, x.mean(0), **FLOAT64)
    torch.testing.assert_close(variance, x.var(0, correction=0), **FLOAT64)


def parts(layer: MoELayer) -> tuple[ProductKeyRouter, BatchQueryNorm]:
    router = layer.router
    assert isinstance(router, ProductKeyRouter)
    assert isinstance(router.query_norm, BatchQueryNorm)
    return router, router.query_norm


def test_running_statistics_move_once_a_step_with_the_momentum():
    layer = peer()
    router, norm = parts(layer)
    rule = QueryNormStatistics(momentum=0.1)
    for step, scale in enumerate((1.0, 3.0), start=1):
        x = scale * torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(step))
        for part in x:
            rule.observe(layer(part)[1][0])
        expected = x.flatten(0, 1) @ router.query.T
        before = norm.mean.clone()
        assert norm.updates == step - 1
        rule.apply(step)
        assert norm.updates == step
        moved = expected.mean(0) if step == 1 else before.lerp(expected.mean(0), 0.1)
        torch.testing.assert_close(norm.mean, moved)


def test_a_step_without_batch_norm_changes_nothing():
    layer = peer()
    layer.eval()
    _, norm = parts(layer)
    norm.update(torch.zeros(8), torch.ones(8))
    rule = QueryNormStatistics()
    rule.observe(layer(torch.randn(5, 8))[1][0])
    rule.apply(1)
    assert norm.updates == 1


def test_it_keeps_nothing_between_steps():
    rule = QueryNormStatistics()
    assert rule.state_dict() == {}
    rule.load_state_dict({})
    with pytest.raises(ValueError, match="keeps no state, got"):
        rule.load_state_dict({"mean": 1})


def test_momentum_is_checked():
    with pytest.raises(ValueError, match=r"query norm momentum=0: allowed is above 0, at most 1"):
        QueryNormStatistics(momentum=0)


class Started(Rule):
    """Notes what it was started with and when."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def start(self, model, optimizer) -> None:
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert trained == {id(p) for p in model.parameters()}
        self.calls.append("start")

    def apply(self, step: int) -> None:
        self.calls.append(f"apply {step}")

    def state_dict(self) -> dict:
        return {"calls": list(self.calls)}

    def load_state_dict(self, state: dict) -> None:
        assert self.calls == ["start"]
        self.calls = state["calls"]


def test_a_rule_meets_model_and_optimizer_before_its_state(tmp_path):
    rule = Started()
    train(tiny_model(), Counting(), tiny_settings(2), [], [rule], tmp_path)
    assert rule.calls == ["start", "apply 1", "apply 2"]
    for end in ("done.json", "hashes.json"):
        (tmp_path / end).unlink()
    again = Started()
    train(tiny_model(), Counting(), tiny_settings(2), [], [again], tmp_path)
    assert again.calls == rule.calls

"""Experts of every cluster rest for a while (checks g and i of MoEC's specification)."""

import pytest
import torch

from moestro.data import Batch
from moestro.evaluate import evaluate
from moestro.experts import FFNBank
from moestro.layers import MoELayer
from moestro.model import Attention, Block, Transformer
from moestro.objectives import FirstChoiceBalance, LoadBalance
from moestro.routers import LinearScore, ResidualRouter, ScoredRouter, TopK
from moestro.train import train
from moestro.train.expert_dropout import ExpertDropout, resting
from moestro.train.optim import build_optimizer
from moestro.train.settings import OptimSettings
from moestro.train.step import backward
from tests.reference import moec as reference
from tests.train.tiny import SEQUENCE, VOCABULARY, WIDTH, Counting, tiny_model, tiny_settings

CLUSTERS = [0, 1, 1, 0, 2, 1, 1, 0]
SIZES = [3, 4, 1]


def model(seed: int = 0) -> Transformer:
    torch.manual_seed(seed)

    def layer() -> MoELayer:
        return MoELayer(ScoredRouter(LinearScore(WIDTH, 8), TopK(2)), [FFNBank(WIDTH, [3] * 8)], clusters=CLUSTERS)

    return Transformer(VOCABULARY, WIDTH, [Block(WIDTH, Attention(WIDTH, n_heads=2), layer()) for _ in range(2)])


def routers(of: Transformer) -> list[ScoredRouter]:
    found = [layer.router for layer in of.moe_layers().values()]
    return [router for router in found if isinstance(router, ScoredRouter)]


def masks(of: Transformer) -> list[list[bool]]:
    return [router.resting.tolist() for router in routers(of)]


def started(of: Transformer, **values) -> ExpertDropout:
    rule = ExpertDropout(**values)
    rule.start(of, build_optimizer(of, OptimSettings()))
    return rule


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.5, 0.99])
def test_so_many_of_every_cluster_rest_and_never_all(rate: float) -> None:
    seen = set()
    for block in range(40):
        found = resting(torch.tensor(CLUSTERS), rate, 3, 1, block)
        for cluster, n in enumerate(SIZES):
            off = int(found[torch.tensor(CLUSTERS) == cluster].sum())
            assert off == reference.resting_in_a_cluster(n, rate) < n
        seen.add(tuple(found.tolist()))
    assert (len(seen) == 1) == (rate == 0)


def test_every_expert_of_a_cluster_rests_about_as_often() -> None:
    share = torch.stack([resting(torch.zeros(6, dtype=torch.int64), 0.5, 0, 0, b) for b in range(600)]).double().mean(0)
    assert float((share - 0.5).abs().max()) < 0.1


def test_who_rests_is_a_function_of_seed_layer_and_block() -> None:
    cluster = torch.arange(64) // 8
    first = resting(cluster, 0.5, 1, 2, 3)
    assert torch.equal(first, resting(cluster, 0.5, 1, 2, 3))
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert not torch.equal(first, resting(cluster, 0.5, *other))


def test_a_mask_stays_for_its_interval_and_is_the_same_on_every_rank() -> None:
    """Two ranks whose weights, data and random state differ."""
    here, there = model(0), model(1)
    rules = [started(of, interval=3, seed=5) for of in (here, there)]
    history = [masks(here)]
    for step in range(1, 10):
        torch.manual_seed(step)
        for rule in rules:
            rule.apply(step)
        assert masks(here) == masks(there)
        history.append(masks(here))
    for start in (0, 3, 6):
        assert history[start] == history[start + 1] == history[start + 2] != history[start + 3]
    assert history[0][0] != history[0][1]


def test_resting_experts_get_no_token_and_no_gradient_and_work_when_evaluated() -> None:
    of = model()
    started(of, rate=0.5)
    batch: Batch = Counting().train_batch(0, 4, 0)
    of.train()
    traces = of(batch.tokens).traces
    backward(of, batch, tiny_settings(), [], [])
    for router, trace in zip(routers(of), traces, strict=True):
        assert router.resting.any() and not trace.routing.load()[router.resting].any()
        assert not router.score.weight.grad[router.resting].any()  # type: ignore[index]
        grad = trace.layer.bank.w_out.weight.grad.view(8, 3, WIDTH)  # type: ignore[attr-defined]
        assert not grad[router.resting].any() and grad[~router.resting].any()
    alone = model().eval()
    torch.testing.assert_close(of.eval()(batch.tokens).logits, alone(batch.tokens).logits, rtol=0, atol=0)


def test_a_rate_of_zero_changes_nothing(tmp_path) -> None:
    ends = []
    for number, rules in enumerate(([ExpertDropout(0.0)], [])):
        trained = model()
        train(trained, Counting(), tiny_settings(3), [], rules, tmp_path / str(number))
        ends.append(trained.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_accumulation_recomputation_and_evaluation_move_no_mask(tmp_path) -> None:
    found = []
    for number, (accumulate, recompute, every) in enumerate([(1, False, 0), (2, True, 1)]):
        trained = model()
        settings = tiny_settings(5, accumulate=accumulate, recompute=recompute, eval_every=every)
        train(trained, Counting(), settings, [], [ExpertDropout(interval=2)], tmp_path / str(number))
        found.append(masks(trained))
    assert found[0] == found[1]
    fresh = model()
    started(fresh, interval=2).apply(4)
    assert masks(fresh) == found[0]
    evaluate(fresh, Counting().val_batches(4))
    assert masks(fresh) == found[0]


def test_a_run_interrupted_inside_an_interval_ends_as_a_whole_one(tmp_path) -> None:
    class Killed(BaseException):
        pass

    class DiesAt(ExpertDropout):
        def apply(self, step: int) -> None:
            if step == 7:
                raise Killed
            super().apply(step)

    DiesAt.__name__ = "ExpertDropout"
    settings, whole, resumed = tiny_settings(12, save_every=5), model(), model()
    train(whole, Counting(), settings, [], [ExpertDropout(interval=4)], tmp_path / "whole")
    with pytest.raises(Killed):
        train(model(), Counting(), settings, [], [DiesAt(interval=4)], tmp_path / "half")
    train(resumed, Counting(), settings, [], [ExpertDropout(interval=4)], tmp_path / "half")
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert any(map(any, masks(whole)))


def test_what_cannot_be_done_is_refused() -> None:
    with pytest.raises(ValueError, match="expert dropout found no clusters"):
        started(tiny_model())
    for values, message in [
        ({"rate": 1.0}, "expert dropout rate=1.0, allowed: at least 0, below 1"),
        ({"interval": 0}, "expert dropout interval=0, allowed: at least 1"),
        ({"seed": -1}, "expert dropout seed=-1, allowed: at least 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            ExpertDropout(**values)
    router = ScoredRouter(LinearScore(4, 4), TopK(2), first_available=3)
    with pytest.raises(ValueError, match="top_k=2 > 1 experts"):
        router.set_resting(torch.tensor([True, True, False, False]))
    with pytest.raises(ValueError, match="allowed: at least one expert"):
        router.set_resting(torch.tensor([True, True, True, False]))
    assert not router.resting.any()


def test_they_rest_whatever_the_layer_before_says() -> None:
    router = ResidualRouter(LinearScore(WIDTH, 4, init_std=1.0), TopK(2), residual_std=1.0)
    router.set_resting(torch.tensor([True, False, False, True]))
    x, load = torch.randn(30, WIDTH), {}
    for training in (True, False):
        router.train(training)
        load[training] = router(x, router(x)).load()
    assert load[True][[0, 3]].sum() == 0 and load[False].min() > 0


def test_moved_experts_go_on_resting() -> None:
    router = ScoredRouter(LinearScore(4, 4), TopK(1))
    router.set_resting(torch.tensor([True, False, False, True]))
    router.reindex(torch.tensor([3, -1, 1]))
    assert router.resting.tolist() == [True, False, False]
    assert router(torch.randn(SEQUENCE, 4)).load()[0] == 0


@pytest.mark.parametrize("objective", [LoadBalance(), FirstChoiceBalance()])
def test_even_use_is_worth_the_same_whoever_rests(objective) -> None:
    """Half of the experts at -inf, the others alike: 1, as without them."""
    for absent in (0, 2):
        router = ScoredRouter(LinearScore(4, 4), TopK(1)).train()
        with torch.no_grad():
            router.score.weight.copy_(1000 * torch.eye(4))
        router.set_resting(torch.arange(4) >= 4 - absent)
        layer = MoELayer(router, [FFNBank(4, [2] * 4)])
        _, (trace,) = layer(torch.eye(4)[: 4 - absent])
        assert objective(trace).item() == pytest.approx(1)

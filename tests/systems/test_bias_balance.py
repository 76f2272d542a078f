"""Balancing without a loss: the router and the rule against the paper's equations, and what training makes of them."""

import pytest
import torch
from torch import nn

from moestro import FFNBank, LinearScore, MoELayer, ScoredRouter, TopK
from moestro.data import Batch
from moestro.evaluate import evaluate
from moestro.model import Attention, Block, Transformer
from moestro.objectives import LoadBalance
from moestro.recipe.build import build_model, build_training
from moestro.recipe.load import load_recipe
from moestro.recipe.syntax import RecipeError
from moestro.routers import BiasedRouter
from moestro.train import BiasBalance, train
from moestro.train.checkpoint import read_tensors
from moestro.train.step import backward
from tests.conftest import ROOT
from tests.reference import bias_balance as reference
from tests.tolerances import FLOAT64
from tests.train.tiny import Counting, tiny_model, tiny_settings

WIDTHS = [2, 4, 6, 8]
RECIPE = ROOT / "recipes" / "moe.yaml"


def layer(d_model: int = 8, seed: int = 0, **options) -> MoELayer:
    torch.manual_seed(seed)
    return MoELayer(BiasedRouter(LinearScore(d_model, 4, init_std=1.0), top_k=2, **options), [FFNBank(d_model, WIDTHS)])


def router(of: MoELayer) -> BiasedRouter:
    assert isinstance(of.router, BiasedRouter)
    return of.router


def model(seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(11, 8, [Block(8, Attention(8, n_heads=2), layer(seed=seed + i)) for i in range(2)])


def biases(of: Transformer) -> list[torch.Tensor]:
    return [router(moe).bias.clone() for moe in of.moe_layers().values()]


def test_the_bias_chooses_and_the_score_weighs() -> None:
    moe = layer().double()
    x = torch.randn(31, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    router(moe).bias.copy_(torch.tensor([0.5, -0.5, 0.1, 0.0]))
    have = router(moe)(x)
    logits = router(moe).score(x)
    want = torch.stack([reference.gates(row, router(moe).bias, 2) for row in logits])
    torch.testing.assert_close(have.dense(), want, **FLOAT64)
    inputs = [x, router(moe).score.weight]
    weights = torch.arange(4.0, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad((have.dense() * weights).sum(), inputs),
        torch.autograd.grad((want * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, **FLOAT64)
    unbiased = logits.sigmoid().topk(2).indices.sort().values
    assert not torch.equal(have.matrix()[0].sort().values, unbiased)
    torch.testing.assert_close(have.logits.softmax(-1), logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True))


def test_without_bias_softmax_gates_are_those_of_top_k() -> None:
    moe = layer(gate="softmax", renormalize=True).double()
    x = torch.randn(31, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    plain = ScoredRouter(router(moe).score, TopK(2))
    torch.testing.assert_close(moe.router(x).dense(), plain(x).dense(), **FLOAT64)
    torch.testing.assert_close(moe.router(x).logits, plain(x).logits)


def test_renormalized_gates_sum_to_one() -> None:
    moe = layer(renormalize=True)
    torch.testing.assert_close(moe.router(torch.randn(9, 8)).dense().sum(-1), torch.ones(9))


@pytest.mark.parametrize("balances", ["tokens", "compute"])
def test_one_step_is_the_papers_update_of_the_whole_batch(balances) -> None:
    moe, rule = layer(), BiasBalance(0.01, balances)
    parts = torch.randn(3, 7, 8, generator=torch.Generator().manual_seed(4))
    counts = [0.0] * 4
    for part in parts:
        _, (trace,) = moe(part)
        rule.observe(trace)
        scale = WIDTHS if balances == "compute" else [1] * 4
        counts = [c + float(n) * s for c, n, s in zip(counts, trace.routing.load(), scale, strict=True)]
    before = router(moe).bias.clone()
    assert not before.any()
    rule.apply(1)
    torch.testing.assert_close(router(moe).bias, reference.updated(before, counts, 0.01))
    assert router(moe).bias.any()


@pytest.mark.parametrize("balances", ["tokens", "compute"])
def test_loads_become_even_in_what_is_balanced(balances) -> None:
    """Tokens: all the same. Compute: load in proportion to 1 / width."""
    moe, rule = layer(), BiasBalance(0.002, balances)
    x = torch.randn(2000, 8, generator=torch.Generator().manual_seed(2)) + 0.5
    weights = torch.tensor([1.0] * 4 if balances == "tokens" else [float(w) for w in WIDTHS])
    spread = []
    for step in range(400):
        _, (trace,) = moe(x)
        balanced = trace.routing.load() * weights
        spread.append(float(balanced.std() / balanced.mean()))
        rule.observe(trace)
        rule.apply(step + 1)
    assert spread[0] > 0.3
    assert max(spread[-20:]) < 0.05, spread[-20:]


def test_compute_of_experts_without_any_is_refused() -> None:
    moe = MoELayer(BiasedRouter(LinearScore(8, 2), 1), [FFNBank(8, [4, 0])])
    _, (trace,) = moe(torch.randn(5, 8))
    BiasBalance(balances="tokens").observe(trace)
    with pytest.raises(ValueError, match="an expert of width 0 never has any; balances: tokens can"):
        BiasBalance(balances="compute").observe(trace)


def test_a_model_without_biases_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"found no router with a bias; allowed: router: \{kind: biased, ...\}"):
        train(tiny_model(), Counting(), tiny_settings(2), [], [BiasBalance()], tmp_path)


def test_values_are_checked() -> None:
    with pytest.raises(ValueError, match="bias balance rate=0, allowed: above 0"):
        BiasBalance(0)
    with pytest.raises(ValueError, match="balances='rows', allowed: tokens, compute"):
        BiasBalance(balances="rows")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"BiasBalance keeps no state, got \['x'\]"):
        BiasBalance().load_state_dict({"x": 1})
    with pytest.raises(ValueError, match="top_k=5, allowed: 1 to 4, the number of experts"):
        BiasedRouter(LinearScore(8, 4), 5)
    with pytest.raises(ValueError, match="gate='relu', allowed: softmax, sigmoid, "):
        BiasedRouter(LinearScore(8, 4), 2, gate="relu")
    with pytest.raises(ValueError, match="top_k=2 > 1 experts"):
        BiasedRouter(LinearScore(8, 4), 2).reindex(torch.tensor([3]))


@pytest.mark.parametrize("convert", [nn.Module.bfloat16, nn.Module.half], ids=["bfloat16", "half"])
def test_biases_stay_in_float32_when_a_model_is_converted(convert) -> None:
    router = BiasedRouter(LinearScore(4, 3), 1)
    router.bias.copy_(torch.tensor([0.5, 0.5 + 1e-3, 0.5 - 1e-3]))
    before = router.bias.clone()
    convert(nn.Sequential(router))
    assert router.score.weight.dtype != torch.float32 and torch.equal(router.bias, before)
    assert torch.equal(router(torch.zeros(2, 4, dtype=router.score.weight.dtype)).expert, torch.tensor([1, 1]))
    assert router.double().bias.dtype == torch.float64


def test_biases_move_with_their_experts() -> None:
    moved = BiasedRouter(LinearScore(8, 4), 2)
    moved.bias.copy_(torch.tensor([0.0, 1.0, 2.0, 5.0]))
    moved.reindex(torch.tensor([3, -1, 0]))
    assert moved.bias.tolist() == [5.0, 2.0, 0.0]
    assert "bias" in moved.state_dict() and "bias" not in dict(moved.named_parameters())


def test_evaluation_and_recomputation_count_nothing(tmp_path) -> None:
    """With and without recomputation, and with evaluations in between, the biases end the same, in rates."""
    ends = []
    for number, (recompute, every) in enumerate([(False, 0), (True, 0), (False, 1)]):
        trained = model()
        settings = tiny_settings(5, recompute=recompute, eval_every=every, accumulate=2)
        train(trained, Counting(), settings, [], [BiasBalance(0.25)], tmp_path / str(number))
        ends.append(biases(trained))
    for other in ends[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ends[0], other, strict=True))
    assert all(bias.any() and (bias * 4 == (bias * 4).round()).all() for bias in ends[0])
    assert float(max(bias.abs().max() for bias in ends[0])) <= 5 * 0.25


def test_evaluation_alone_moves_nothing() -> None:
    untouched = model()
    evaluate(untouched, Counting().val_batches(4))
    assert not any(bias.any() for bias in biases(untouched))


def test_accumulation_changes_nothing(monkeypatch) -> None:
    batch: Batch = Counting().train_batch(0, 4, 0)
    ends = []
    for accumulate in (1, 2, 4):
        fresh, rule = model(), BiasBalance()
        backward(fresh, batch, tiny_settings(accumulate=accumulate), [], [rule])
        rule.apply(1)
        ends.append(torch.stack(biases(fresh)))
    assert ends[0].any() and torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])


def test_an_interrupted_run_ends_as_a_whole_one(tmp_path) -> None:
    class Killed(BaseException):
        pass

    class DiesAt(BiasBalance):
        def apply(self, step: int) -> None:
            if step == 7:
                raise Killed
            super().apply(step)

    DiesAt.__name__ = "BiasBalance"
    settings = tiny_settings(12, save_every=5)
    whole, half = model(), model()
    train(whole, Counting(), settings, [], [BiasBalance()], tmp_path / "whole")
    with pytest.raises(Killed):
        train(half, Counting(), settings, [], [DiesAt()], tmp_path / "half")
    saved = read_tensors(tmp_path / "half" / "checkpoints" / "step-00000005", "model")
    assert saved["blocks.0.ffn.router.bias"].any()
    resumed = model()
    train(resumed, Counting(), settings, [], [BiasBalance()], tmp_path / "half")
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_recipes_know_router_and_rule(tmp_path) -> None:
    overrides = ["model.ffn.router={kind: biased, score: {kind: linear}, top_k: 2, gate: sigmoid}"]
    recipe = load_recipe(RECIPE, [*overrides, "rules=[{kind: bias_balance, rate: 0.01, balances: compute}]"])
    _, objectives, (rule,) = build_training(recipe)
    assert isinstance(rule, BiasBalance) and (rule.rate, rule.balances) == (0.01, "compute")
    built = build_model(recipe, 16)
    assert all(isinstance(moe.router, BiasedRouter) for moe in built.moe_layers().values())
    traces = built(torch.arange(12)[None]).traces
    value = LoadBalance()(traces[0])
    assert torch.isfinite(value) and [name for name, _, _ in objectives] == ["load_balance"]
    with pytest.raises(RecipeError, match="unknown value 'rows'; allowed: compute, tokens"):
        load_recipe(RECIPE, [*overrides, "rules=[{kind: bias_balance, balances: rows}]"])

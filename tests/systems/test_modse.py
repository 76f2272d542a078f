"""MoDSE: noisy top-2 over pairs of experts, and where the pairs live."""

import pytest
import torch

from moestro import FFNBank, MoELayer, ScoredRouter, TopK
from moestro.experts.widths import pairs
from moestro.model import Attention, Block, Transformer
from moestro.objectives import LoadBalance
from moestro.recipe.build import build_model, build_training
from moestro.recipe.load import load_recipe
from moestro.routers import NoisyScore
from tests.conftest import ROOT
from tests.reference import modse as reference
from tests.tolerances import FLOAT64
from tests.train.tiny import VOCABULARY

D, WIDTHS = 6, [7, 1, 6, 2]
close = torch.testing.assert_close


def layer() -> MoELayer:
    torch.manual_seed(0)
    moe = MoELayer(ScoredRouter(NoisyScore(D, 4, init_std=1.0), TopK(2)), [FFNBank(D, WIDTHS)]).double()
    torch.nn.init.normal_(score(moe).spread)
    return moe


def score(of: MoELayer) -> NoisyScore:
    assert isinstance(of.router, ScoredRouter) and isinstance(of.router.score, NoisyScore)
    return of.router.score


def tokens(n: int = 13) -> torch.Tensor:
    return torch.randn(n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)


def test_noisy_routing_equals_the_equations() -> None:
    moe, x = layer(), tokens()
    torch.manual_seed(5)
    routing = moe.router(x)
    torch.manual_seed(5)
    noise = torch.randn(len(x), 4, dtype=torch.float64)
    logits = [reference.noisy_logits(x[t], score(moe).weight, score(moe).spread, noise[t]) for t in range(len(x))]
    want = torch.stack([reference.gates(row, 2) for row in logits])
    close(routing.logits, torch.stack(logits), **FLOAT64)
    close(routing.dense(), want, **FLOAT64)
    leaves = [x, score(moe).weight, score(moe).spread]
    weights = torch.arange(4.0, dtype=torch.float64)
    have = torch.autograd.grad((routing.dense() * weights).sum(), leaves)
    for a, b in zip(have, torch.autograd.grad((want * weights).sum(), leaves), strict=True):
        close(a, b, **FLOAT64)
        assert a.any()


def test_evaluation_has_no_noise() -> None:
    moe, x = layer().eval(), tokens()
    close(moe.router(x).logits, x @ score(moe).weight.T, **FLOAT64)
    assert not torch.equal(moe.train().router(x).logits, moe.router(x).logits)


def test_the_noise_starts_with_standard_deviation_log_2() -> None:
    torch.manual_seed(0)
    fresh = NoisyScore(D, 4000)
    x = tokens(8).float().detach()
    noise = fresh(x) - fresh.eval()(x)
    assert float(noise.detach().std()) == pytest.approx(reference.NOISE_AT_START, rel=0.02)


def test_recomputed_blocks_draw_the_same_noise() -> None:
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        blocks = [Block(D, Attention(D, n_heads=1), layer()) for _ in range(2)]
        model = Transformer(VOCABULARY, D, blocks).double()
        model.recompute = recompute
        torch.manual_seed(9)
        model(torch.tensor([[1, 5, 2, 8]])).logits.square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        close(a, b, **FLOAT64)


def test_the_recipe_is_modse() -> None:
    recipe = load_recipe(ROOT / "recipes" / "modse.yaml")
    for moe in build_model(recipe, 64, "meta").moe_layers().values():
        assert isinstance(score(moe), NoisyScore)
        assert moe.expert_widths().tolist() == pairs(512, multiple_of=4)  # type: ignore[union-attr]
    assert build_training(recipe)[1] == [("load_balance", 0.01, LoadBalance())]

"""MoEC against its reference, and the exact checks of its specification:

(a) one cluster, (b) clusters of one expert, (d) even inside, (e) the gradient, (f) permutations, (h) batch size:
test_clusters.py. (c) neither loss nor dropout: test_clusters_alone_change_nothing. (g) dropout: test_expert_dropout.py.
(i) resuming: test_expert_dropout.py. (j) the gate: test_a_gate_of_zero_is_the_identity.
"""

import pytest
import torch

from moestro.experts import FFNBank
from moestro.layers import MoELayer
from moestro.model import Attention, Block
from moestro.objectives import ClusterVariance, LoadBalance, ParameterPenalty
from moestro.recipe.build import build_model, build_training
from moestro.recipe.load import load_recipe
from moestro.routers import Capacity, LowRankCosineScore, ScoredRouter, TopK
from moestro.train.expert_dropout import ExpertDropout
from tests.conftest import ROOT
from tests.reference import moec as reference
from tests.tolerances import FLOAT64

D, E, T = 6, 8, 30


def layer(clusters: int | None = 4, temperature: float = 0.3) -> MoELayer:
    torch.manual_seed(1)
    score = LowRankCosineScore(D, E, rank=3, temperature=temperature)
    router = ScoredRouter(score, TopK(1, renormalize=False, gate="interpolate"))
    return MoELayer(router, [FFNBank(D, [4] * E, "relu", glu=False)], clusters=clusters).double()


def score(of: MoELayer) -> LowRankCosineScore:
    found = of.router.score  # type: ignore[union-attr]
    assert isinstance(found, LowRankCosineScore)
    return found


def tokens(n: int = T) -> torch.Tensor:
    return torch.randn(n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(n))


def test_gates_and_losses_equal_the_reference() -> None:
    """Values, and gradients to the tokens, the projection, the directions and the temperature."""
    moe, x = layer(), tokens().requires_grad_()
    part = score(moe)
    leaves = [x, part.project, part.weight, part.temperature]
    _, (trace,) = moe(x)
    c = reference.cosines(x, part.project, part.weight)
    clusters = [[0, 1], [2, 3], [4, 5], [6, 7]]
    p = reference.shares(c, part.temperature)
    slope = torch.arange(float(E), dtype=torch.float64)
    cases = [
        ((trace.routing.dense() * slope).sum(), (reference.gates(c, part.temperature) * slope).sum()),
        (LoadBalance()(trace), reference.balance(c, part.temperature)),
        (ClusterVariance()(trace), reference.within(p, clusters)),
    ]
    for have, want in cases:
        torch.testing.assert_close(have, want, **FLOAT64)
        mine, theirs = (torch.autograd.grad(value, leaves, retain_graph=True) for value in (have, want))
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, **FLOAT64)
    torch.testing.assert_close(trace.routing.dense(), reference.gates(c, part.temperature), **FLOAT64)
    assert all(bool(gradient.any()) for gradient in mine)


def test_a_capacity_hides_no_load_from_the_balance() -> None:
    """As in the code, whose gate counts tokens before experts drop any."""
    moe, x = layer(), tokens()
    select = moe.router.select
    for objective in (LoadBalance(), ParameterPenalty(), LoadBalance(statistics="step")):
        moe.router.select = select
        want = objective(moe(x)[1][0])
        moe.router.select = Capacity(select, 0.4)
        (trace,) = moe(x)[1]
        assert trace.routing.n_rows < len(x)
        torch.testing.assert_close(objective(trace), want, rtol=0, atol=0)


def test_a_fixed_temperature_learns_nothing_and_has_a_floor() -> None:
    fixed = LowRankCosineScore(D, E, rank=3, learn_temperature=False)
    assert not fixed.temperature.requires_grad and float(fixed.temperature) == pytest.approx(0.07)
    assert "temperature" in fixed.state_dict()
    logits = fixed(tokens().float())
    with torch.no_grad():
        fixed.temperature.fill_(-1.0)
    torch.testing.assert_close(fixed(tokens().float()), logits * 0.07 / 1e-4)


def test_the_projection_costs_what_it_multiplies() -> None:
    part = LowRankCosineScore(D, E, rank=3)
    assert part.flops(10) == 2 * 10 * (3 * D + E * 3)
    assert part.weight.shape == (E, 3)
    gram = LowRankCosineScore(16, 3, rank=8).weight
    torch.testing.assert_close(gram @ gram.T, 0.01 * torch.eye(3))


def test_clusters_alone_change_nothing() -> None:
    plain, clustered, x = layer(clusters=None), layer(), tokens()
    assert torch.equal(plain(x)[0], clustered(x)[0])
    assert torch.equal(plain(x)[1][0].routing.logits, clustered(x)[1][0].routing.logits)
    assert torch.equal(LoadBalance()(plain(x)[1][0]), LoadBalance()(clustered(x)[1][0]))
    assert clustered.cluster is not None and clustered.cluster.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert "cluster" not in plain.state_dict() and "cluster" in clustered.state_dict()


def test_a_gate_of_zero_is_the_identity() -> None:
    """In a block, x + alpha f(x) is alpha (x + f(x)) + (1 - alpha) x: an expert with its own residual, interpolated
    with its input; at alpha = 0 it is x."""
    moe = layer()
    block = Block(D, Attention(D, n_heads=1), moe).double()
    x = tokens(5)[None]
    with torch.no_grad():
        block.attention.out.weight.zero_()
    y, (trace,) = block(x, torch.arange(5)[None])
    h, f = block.ffn_norm(x)[0], []
    for t, e in zip(trace.routing.token.tolist(), trace.routing.expert.tolist(), strict=True):
        offsets = torch.zeros(E + 1, dtype=torch.int64)
        offsets[e + 1 :] = 1
        f.append(moe.bank.run(h[t : t + 1], offsets))
    alpha = trace.routing.weight[:, None]
    torch.testing.assert_close(y[0], alpha * (x[0] + torch.cat(f)) + (1 - alpha) * x[0], **FLOAT64)
    with torch.no_grad():
        # every cosine is -1: gates are sigmoid(-1 / 1e-4) = 0
        score(moe).project.copy_(torch.zeros(3, D)).index_fill_(0, torch.tensor([0]), 1.0)
        score(moe).weight.copy_(torch.tensor([[-1.0, 0.0, 0.0]]).expand(E, 3))
        score(moe).temperature.fill_(1e-4)
    same = x.abs()
    torch.testing.assert_close(block(same, torch.arange(5)[None])[0], same, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "block", "experts", "clusters", "factor", "weight"),
    [("moec", 2, 16, 4, 2, 0.64), ("paper/moec", 5, 64, 8, 8, 0.01 * 4096 / 32)],
)
def test_recipes(name: str, block: int, experts: int, clusters: int, factor: int, weight: float) -> None:
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml")
    model = build_model(recipe, 32_000, "meta")
    ((where, moe),) = model.moe_layers().items()
    assert where == f"blocks.{block}.ffn" and moe.router.n_experts == experts
    assert recipe.tree["model"]["layers"][block]["clusters"] == clusters
    assert moe.router.score.project.shape[0] == 32  # type: ignore[union-attr]
    select = moe.router.select  # type: ignore[union-attr]
    assert isinstance(select, Capacity) and select.factor == factor and isinstance(select.select, TopK)
    assert (select.select.top_k, select.select.gate, select.select.renormalize) == (1, "interpolate", False)
    _, objectives, (rule,) = build_training(recipe)
    assert objectives == [("load_balance", 0.01, LoadBalance()), ("cluster_variance", weight, ClusterVariance())]
    assert isinstance(rule, ExpertDropout) and rule.rate == 0.5

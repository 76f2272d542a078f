"""DynMoE (Guo 2024, arXiv:2405.14297): its layer against the reference, and the exact checks of its description.

    (a) who is active, whatever the sharpness and the lengths of x and w      test_active_*
    (b) G = -1.01: all experts, and the plain mean of their outputs           test_thresholds_below_every_cosine_*
    (c) G = +1.01: nothing in training, the best expert in evaluation         test_thresholds_above_every_cosine_*
    (d) one expert: its output, not scaled                                    test_a_token_with_one_expert_*
    (e) at the start: diversity 0, simplicity 1, mean k E / 2                 test_at_the_start_*
    (f) straight-through gradient against a finite difference                 test_the_gate_gradient_*, test_*_equal_*
    (g) an unavailable slot: never chosen, no gradient                        test_an_unavailable_*
    (h)-(m) the adaptive process                                              test_adaptive_experts.py
Directional ones (mean k falls, experts differ by layer, ...) are in bench/effects/.
"""

import math

import pytest
import torch

from moestro.objectives import GateBalance, GateEfficiency, RouterDiversity, RouterSimplicity
from moestro.recipe.build import build_model
from moestro.recipe.load import load_recipe
from moestro.routers import CosineScore, LinearScore, ScoredRouter, TopAny, TopK
from tests.conftest import ROOT
from tests.reference import dynmoe
from tests.systems.hmoe_layers import make_layer, random
from tests.systems.top_any_layers import MASK, WIDTHS, D, Twin, router_of, select_of, set_thresholds, top_any_layer
from tests.tolerances import FLOAT64

close = torch.testing.assert_close
E = len(WIDTHS)
LEVELS = [0.1, -0.3, 0.0, 0.25, -0.1]
OPTIONS = [
    {},
    {"gradient": "normalized"},
    {"sharpness": 10.0, "learn_sharpness": True},
    {"gradient": "normalized", "sharpness": 3.0},
]


def chosen_sets(layer, x) -> list[set[int]]:
    routing = layer.router(x)
    sets = [set() for _ in x]
    for token, expert in zip(routing.token.tolist(), routing.expert.tolist(), strict=True):
        sets[token].add(expert)
    return sets


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", OPTIONS)
def test_outputs_and_gradients_equal_the_reference(options, training) -> None:
    """y, and the gradients of x, router rows, thresholds, sharpness and experts, with k = 0 among the tokens."""
    layer = top_any_layer(MASK, **options).train(training)
    set_thresholds(layer, LEVELS)
    twin, x, weights = Twin(layer), random(40, D), random(40, D)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    have, (trace,) = layer(mine)
    want, chosen = twin(theirs)
    close(have, want, **FLOAT64)
    counts = {len(gates) for gates in chosen}
    assert {0, 1, 2} <= counts
    assert trace.experts_per_token().tolist() == [max(len(g), 0 if training else 1) for g in chosen]
    if training:
        (have * weights).sum().backward()
        (want * weights).sum().backward()
        close(mine.grad, theirs.grad, **FLOAT64)
        for name, parameter in layer.named_parameters():
            close(parameter.grad, twin.leaves[name].grad, **FLOAT64, msg=lambda m, name=name: f"{name}: {m}")


def test_the_first_of_equal_gates_is_that_of_the_greatest_logit() -> None:
    """Strata and probes ask for it: the lowest number would be no choice."""
    layer = top_any_layer()
    routing = layer.router(random(60, D))
    some = routing.per_token(1.0) > 0
    assert torch.equal(routing.first_choice()[some], routing.logits.argmax(-1)[some]) and not some.all()
    assert not routing.first_choice()[~some].any()


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 10.0, 100.0])
def test_active_is_whose_cosine_exceeds_its_threshold(sharpness) -> None:
    layer = top_any_layer(MASK, sharpness=sharpness, orthogonal=False)
    set_thresholds(layer, LEVELS)
    x, w = random(60, D), router_of(layer).score.weight
    cosine = torch.nn.functional.cosine_similarity(x[:, None], w[None], dim=-1)
    want = [{e for e in range(E) if MASK[e] and row[e] > LEVELS[e]} for row in cosine]
    assert chosen_sets(layer, x) == want
    assert chosen_sets(layer, x * torch.rand(60, 1) * 100) == want
    with torch.no_grad():
        w.mul_(torch.tensor([0.01, 3.0, 1.0, 50.0, 0.5])[:, None])
    assert chosen_sets(layer, x) == want


def test_active_pairs_survive_a_sharpness_that_rounds_their_scores_to_one() -> None:
    """In float32 sigmoid(100 * 0.5) and sigmoid(100 * 0.3) are both 1; the pair is active all the same."""
    select = TopAny(2, sharpness=100.0)
    with torch.no_grad():
        select.thresholds.copy_(torch.tensor([0.3, 0.9]))
    routing = select(torch.tensor([[0.5, 0.5]]))
    assert routing.expert.tolist() == [0] and routing.weight.tolist() == [1.0]


def test_thresholds_below_every_cosine_take_the_mean_of_all() -> None:
    layer, x = top_any_layer(), random(12, D)
    set_thresholds(layer, -1.01)
    y, (trace,) = layer(x)
    offsets = torch.zeros(E + 1, dtype=torch.int64)
    outputs = []
    for e in range(E):
        offsets[:] = 0
        offsets[e + 1 :] = len(x)
        outputs.append(layer.bank.run(x, offsets))
    close(y, torch.stack(outputs).mean(0), **FLOAT64)
    assert (trace.experts_per_token() == E).all()


def test_thresholds_above_every_cosine_leave_nothing_in_training_and_the_best_in_evaluation() -> None:
    layer, x = top_any_layer(), random(12, D)
    set_thresholds(layer, 1.01)
    y, (trace,) = layer(x)
    assert not y.any() and trace.routing.n_rows == 0
    y.sum().backward()
    layer.eval()
    best = ScoredRouter(router_of(layer).score, TopK(1))(x)
    routing = layer.router(x)
    assert torch.equal(routing.expert, best.expert) and torch.equal(routing.token, best.token)
    assert (routing.weight == 1).all()


def test_a_token_with_one_expert_gets_its_output_unscaled() -> None:
    layer, x = top_any_layer(), random(80, D)
    set_thresholds(layer, 0.45)
    y, (trace,) = layer(x)
    alone = trace.experts_per_token() == 1
    assert 5 < int(alone.sum()) < 75
    want = ScoredRouter(router_of(layer).score, TopK(1))(x)
    close(y[alone], layer.bank(x, want)[alone], **FLOAT64)


def test_at_the_start_rows_are_orthonormal_and_half_the_experts_fire() -> None:
    score = CosineScore(64, 16, temperature=1.0, orthogonal=True).double()
    layer = top_any_layer()
    layer.router = ScoredRouter(score, TopAny(16)).double()
    trace = layer.router(random(4000, 64))
    assert layer.router.rows_per_token() == 8
    assert abs(float(trace.per_token(1.0).mean()) - 8) < 0.1
    fresh = top_any_layer()
    _, (trace,) = fresh(random(3, D))
    assert RouterDiversity()(trace).item() < 1e-6
    assert abs(RouterSimplicity()(trace).item() - 1) < 1e-6


def test_the_gate_gradient_is_that_of_the_surrogate() -> None:
    """d loss / d(s - theta) of an active pair, by finite difference of y(g) = sum g_e FFN_e / k with k held."""
    layer, x, weights = top_any_layer(), random(20, D), random(20, D)
    set_thresholds(layer, LEVELS)
    routing = layer.router(x)
    gate = routing.weight.detach().clone() * routing.per_token(1.0)[routing.token]
    assert (gate == 1).all()
    step, k = 1e-5, routing.per_token(1.0)[routing.token]
    wanted = []
    for n in range(routing.n_rows):
        losses = []
        for sign in (1, -1):
            moved = gate.clone()
            moved[n] += sign * step
            dense = torch.zeros(20, E, dtype=torch.float64).index_put((routing.token, routing.expert), moved / k)
            losses.append((outputs_of(layer, x, dense) * weights).sum())
        wanted.append((losses[0] - losses[1]) / (2 * step))
    (weight_gradient,) = torch.autograd.grad((layer(x)[0] * weights).sum(), select_of(layer).thresholds)
    theta = select_of(layer).thresholds.detach().sigmoid()
    slope = -theta * (1 - theta)
    by_expert = torch.zeros(E, dtype=torch.float64).index_add(0, routing.expert, torch.stack(wanted))
    close(weight_gradient, by_expert * slope, rtol=1e-6, atol=1e-8)


def outputs_of(layer, x, dense) -> torch.Tensor:
    """Sum of the experts' outputs with these weights."""
    y = torch.zeros_like(x)
    for e in range(E):
        offsets = torch.zeros(E + 1, dtype=torch.int64)
        offsets[e + 1 :] = len(x)
        y = y + dense[:, e, None] * layer.bank.run(x, offsets).detach()
    return y


def test_inactive_experts_get_no_gradient() -> None:
    layer, x = top_any_layer(), random(20, D)
    set_thresholds(layer, [1.01, -1.01, 1.01, -1.01, -1.01])
    layer(x)[0].square().sum().backward()
    for parameter in (select_of(layer).thresholds, router_of(layer).score.weight):
        assert not parameter.grad[[0, 2]].any() and parameter.grad[[1, 3, 4]].any()


def test_normalized_gates_give_a_single_expert_no_gradient() -> None:
    layer, x = top_any_layer(gradient="normalized"), random(60, D)
    set_thresholds(layer, 0.45)
    k = layer.router(x).per_token(1.0)
    layer(x[k <= 1])[0].square().sum().backward()
    assert float(select_of(layer).thresholds.grad.abs().max()) < 1e-12


def test_an_unavailable_expert_is_not_chosen_in_evaluation_either() -> None:
    layer, x = top_any_layer(MASK).eval(), random(50, D)
    set_thresholds(layer, 1.01)
    with torch.no_grad():
        router_of(layer).score.weight[2] = x[0]
    assert all(len(members) == 1 and 2 not in members for members in chosen_sets(layer, x))
    layer(x)[0].square().sum().backward()
    assert not router_of(layer).score.weight.grad[2].any() and not select_of(layer).thresholds.grad[2]


@pytest.mark.parametrize("mask", [[True] * E, MASK])
@pytest.mark.parametrize("name", ["diversity", "simplicity", "balance", "efficiency"])
def test_objectives_equal_the_reference(name, mask) -> None:
    """Values and gradients with respect to x, router rows and thresholds; some tokens have no expert."""
    layer, x = top_any_layer(mask, orthogonal=False, sharpness=2.0), random(30, D)
    set_thresholds(layer, [0.4, 0.2, 0.0, 0.35, 0.3])
    twin = Twin(layer)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    _, (trace,) = layer(mine)
    _, chosen = twin(theirs)
    assert any(not gates for gates in chosen)
    ours = {
        "diversity": RouterDiversity(),
        "simplicity": RouterSimplicity(),
        "balance": GateBalance(),
        "efficiency": GateEfficiency(),
    }[name](trace)
    wanted = {
        "diversity": lambda: dynmoe.diversity(twin.W, mask),
        "simplicity": lambda: dynmoe.simplicity(twin.W, mask),
        "balance": lambda: dynmoe.balance(chosen, mask),
        "efficiency": lambda: dynmoe.efficiency(chosen, mask),
    }[name]()
    close(ours, wanted, **FLOAT64)
    router, select = router_of(layer).score.weight, select_of(layer).thresholds
    have = torch.autograd.grad(ours, [mine, router, select], allow_unused=True)
    want = torch.autograd.grad(wanted, [theirs, twin.W, twin.G], allow_unused=True)
    assert any(gradient is not None and gradient.any() for gradient in want)
    for a, b in zip(have, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            close(a, b, **FLOAT64)


def test_even_gates_cost_the_mean_k() -> None:
    layer, x = top_any_layer(), random(9, D)
    set_thresholds(layer, -1.01)
    _, (trace,) = layer(x)
    close(GateBalance()(trace), torch.tensor(float(E), dtype=torch.float64), **FLOAT64)
    close(GateEfficiency()(trace), torch.tensor(1.0, dtype=torch.float64), **FLOAT64)


def test_objectives_of_a_batch_without_rows_are_finite() -> None:
    layer = top_any_layer()
    set_thresholds(layer, 1.01)
    for x in (random(5, D), random(0, D)):
        _, (trace,) = layer(x)
        for objective in (GateBalance(), GateEfficiency(), RouterDiversity(), RouterSimplicity()):
            value = objective(trace)
            assert torch.isfinite(value)
            value.backward(retain_graph=True)
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in layer.parameters())


def test_thresholds_move_with_their_experts() -> None:
    layer = top_any_layer()
    set_thresholds(layer, LEVELS)
    layer.reindex(torch.tensor([4, -1, 0]))
    close(select_of(layer).thresholds.detach(), torch.tensor([-0.1, 0.0, 0.1], dtype=torch.float64))
    fresh = router_of(layer).score.weight[1]
    close(fresh.norm(), torch.tensor(1.0, dtype=torch.float64))


def test_a_learned_sharpness_stays_below_its_cap() -> None:
    select = TopAny(2, sharpness=10.0, learn_sharpness=True)
    assert isinstance(select.log_sharpness, torch.nn.Parameter)
    with torch.no_grad():
        select.log_sharpness.fill_(math.log(1000.0))
    gates = select.gates(torch.tensor([0.01]), torch.tensor([0]))
    (slope,) = torch.autograd.grad(gates.sum(), select.thresholds)
    assert float(slope[0]) == pytest.approx(-100 * 0.25)


def test_values_are_checked() -> None:
    with pytest.raises(ValueError, match="gradient='both', allowed: constant, normalized"):
        TopAny(3, gradient="both")  # type: ignore[arg-type]
    for sharpness in (0.0, 101.0):
        with pytest.raises(ValueError, match=f"sharpness={sharpness}, allowed: above 0, at most 100"):
            TopAny(3, sharpness=sharpness)
    with pytest.raises(ValueError, match="n_experts=7 rows cannot be orthogonal, allowed: up to d_model=6"):
        LinearScore(6, 7, orthogonal=True)
    _, (trace,) = make_layer(WIDTHS, TopK(2))(random(3, D))
    with pytest.raises(ValueError, match=r"gate_balance needs select: \{kind: top_any\}, got TopK"):
        GateBalance()(trace)
    with pytest.raises(ValueError, match=r"router_diversity needs router: \{kind: scored, \.\.\.\}, got Linear"):
        RouterDiversity()(type("T", (), {"layer": type("L", (), {"router": torch.nn.Linear(1, 1)})()})())


def test_the_papers_model_has_2_9_billion_parameters() -> None:
    """StableLM-2-1.6B with up to 4 experts in every other layer, 2 of them at the start."""
    recipe = load_recipe(ROOT / "recipes" / "paper" / "dynmoe-stablelm.yaml")
    model = build_model(recipe, 100_352, "meta")
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 1) == 2.9
    layers = model.moe_layers()
    assert list(layers) == [f"blocks.{i}.ffn" for i in range(0, 24, 2)]
    assert all(layer.bank.widths == (5632,) * 4 and layer.router.rows_per_token() == 1 for layer in layers.values())

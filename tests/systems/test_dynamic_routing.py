"""Dynamic routing (Huang 2024, arXiv:2403.07652): top-p with raw probabilities as gates, and steering its threshold.

(a) p = 0: top-1 with the raw probability                      test_a_threshold_of_zero_*
(b) p >= 1: all experts, the dense mixture                     test_a_threshold_of_one_*
(c) larger p: larger sets; (d) C_{t-1} <= p < C_t on every row test_sets_grow_*, test_the_sum_*
(e) uniform: t = floor(p E) + 1; one-hot: 1                    test_uniform_and_one_hot_*
(f) permuting experts permutes the set                         test_permuted_*
(g) dropless: rows = sum of t = sum of load                    test_no_row_is_dropped
(h) the grouped path equals the loop over experts              test_outputs_* (float64), test_float32_*
(i) entropy: ln E, 0, and its gradient                         test_entropy_*
(j) balance: Switch's for k = 1, mean k when perfect           test_balance_*
(k) gradients of unselected experts and of their logits        test_unselected_*
(l) decoding with a cache token by token                       test_decoding_*
"""

import math

import pytest
import torch

from moestro.experts import FFNBank
from moestro.layers import MoELayer
from moestro.model import Attention, Block, Cache, Transformer
from moestro.objectives import LoadBalance, RouterEntropy
from moestro.recipe.build import build_model
from moestro.recipe.load import load_recipe
from moestro.routers import LinearScore, ScoredRouter, TopP
from moestro.routing import Trace
from tests.conftest import ROOT
from tests.reference import dynamic_routing as reference
from tests.reference import hmoe
from tests.systems.hmoe_layers import assert_same_experts, bank_of, leaves, random, router_weight
from tests.tolerances import FLOAT32, FLOAT64

close = torch.testing.assert_close
D, E = 6, 8
WIDTHS = [4] * E


def top_p(threshold: float) -> TopP:
    return TopP(threshold, renormalize=False, strict=True)


def layer(threshold: float = 0.4, std: float = 1.0) -> MoELayer:
    router = ScoredRouter(LinearScore(D, E, init_std=std), top_p(threshold))
    return MoELayer(router, [FFNBank(D, WIDTHS)]).double()


def sets(logits: torch.Tensor, threshold: float) -> list[set[int]]:
    routing = top_p(threshold)(logits)
    found = [set() for _ in logits]
    for token, expert in zip(routing.token.tolist(), routing.expert.tolist(), strict=True):
        assert expert not in found[token]
        found[token].add(expert)
    return found


def mixture(moe: MoELayer, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    experts = leaves(bank_of(moe))
    outputs = torch.stack([torch.stack([hmoe.swiglu_expert(x_t, e) for e in experts]) for x_t in x])
    return torch.einsum("te,ted->td", weights, outputs).detach()


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.4, 0.7, 1.0])
def test_outputs_and_gradients_equal_the_reference(threshold) -> None:
    moe, x, weights = layer(threshold), random(30, D), random(30, D)
    experts, W = leaves(bank_of(moe)), router_weight(moe).detach().clone().requires_grad_()
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, (trace,) = moe(mine)
    functions = [lambda x_t, e=e: hmoe.swiglu_expert(x_t, e) for e in experts]
    want, _, chosen = reference.layer(theirs, W, functions, threshold)
    close(y, want, **FLOAT64)
    assert trace.experts_per_token().tolist() == [len(members) for members in chosen]
    assert threshold not in (0.4, 0.7) or len({len(members) for members in chosen}) > 1
    (y * weights).sum().backward()
    (want * weights).sum().backward()
    close(mine.grad, theirs.grad, **FLOAT64)
    close(router_weight(moe).grad, W.grad, **FLOAT64)
    assert_same_experts(bank_of(moe), experts)


def test_float32_equals_the_loop_over_experts() -> None:
    moe, x = layer(0.6), random(40, D)
    functions = [lambda x_t, e=e: hmoe.swiglu_expert(x_t, e) for e in leaves(bank_of(moe))]
    want, _, _ = reference.layer(x, router_weight(moe).detach(), functions, 0.6)
    close(moe.float()(x.float())[0].double(), want.detach(), **FLOAT32)


def test_a_threshold_of_zero_is_top_1_with_its_probability() -> None:
    moe, x = layer(0.0), random(30, D)
    p = (x @ router_weight(moe).T).softmax(-1)
    best = torch.zeros_like(p).scatter(1, p.argmax(-1, keepdim=True), p.amax(-1, keepdim=True))
    close(moe.router(x).dense(), best, **FLOAT64)
    close(moe(x)[0].detach(), mixture(moe, x, best), **FLOAT64)


def test_a_threshold_of_one_is_the_dense_mixture_however_sums_round() -> None:
    moe, x = layer(1.0), random(30, D)
    p = (x @ router_weight(moe).T).softmax(-1)
    close(moe(x)[0].detach(), mixture(moe, x, p), **FLOAT64)
    generator = torch.Generator().manual_seed(0)
    logits = 30 * torch.randn(2000, 16, generator=generator)
    total = logits.softmax(-1).sort(descending=True).values.cumsum(-1)[:, -1]
    assert (total > 1).any() and (total < 1).any()
    assert top_p(1.0)(logits).n_rows == 2000 * 16


def test_sets_grow_with_the_threshold() -> None:
    logits = 2 * random(200, E)
    ladder = [sets(logits, threshold) for threshold in (0.0, 0.1, 0.3, 0.5, 0.8, 0.95, 1.0)]
    for small, large in zip(ladder, ladder[1:], strict=False):
        assert all(a <= b for a, b in zip(small, large, strict=True))
    assert ladder[0] != ladder[3] != ladder[6]


@pytest.mark.parametrize("threshold", [0.1, 0.4, 0.9])
def test_the_sum_before_the_last_expert_is_at_most_p_and_with_it_above(threshold) -> None:
    logits = 2 * torch.randn(20_000, 16, generator=torch.Generator().manual_seed(1))
    k = top_p(threshold)(logits).per_token(1.0).long()
    sums = logits.softmax(-1).sort(descending=True, stable=True).values.cumsum(-1)
    padded = torch.nn.functional.pad(sums, (1, 0))
    assert (padded.gather(1, k[:, None] - 1) <= threshold).all()
    assert (padded.gather(1, k[:, None]) > threshold).all()


def test_uniform_and_one_hot_probabilities() -> None:
    assert sets(torch.zeros(1, 16), 0.4) == [set(range(7))]
    # exactly reached: strictly more is one expert more
    assert sets(torch.zeros(1, 16), 0.375) == [set(range(7))]
    assert TopP(0.375)(torch.zeros(1, 16)).n_rows == 6
    one_hot = torch.full((1, 16), -200.0)
    one_hot[0, 3] = 200.0
    for threshold in (0.0, 0.4, 0.999):
        assert sets(one_hot, threshold) == [{3}]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.125, 0.5, 0.6, 1.0])
def test_expected_rows_are_those_of_equal_probabilities(threshold: float, strict: bool) -> None:
    select = TopP(threshold, strict=strict)
    assert select(torch.zeros(1, 8)).n_rows == select.rows_per_token(8)


def test_permuted_experts_give_a_permuted_set() -> None:
    logits = 2 * random(50, E)
    order = torch.randperm(E)
    for before, after in zip(sets(logits, 0.6), sets(logits[:, order], 0.6), strict=True):
        assert {int(order[e]) for e in after} == before


def test_no_row_is_dropped() -> None:
    routing = layer(0.6).router(random(80, D))
    assert routing.n_rows == routing.per_token(1.0).sum() == routing.load().sum() == routing.offsets[-1]


def trace_of(logits: torch.Tensor, threshold: float = 0.4) -> Trace:
    return Trace(layer(), logits.new_zeros(len(logits), D), top_p(threshold)(logits))


def test_entropy_of_uniform_and_one_hot_rows_and_its_gradient() -> None:
    uniform = torch.zeros(3, E, dtype=torch.float64)
    close(RouterEntropy()(trace_of(uniform)), torch.tensor(math.log(E), dtype=torch.float64), **FLOAT64)
    one_hot = uniform.clone()
    one_hot[:, 2] = 800.0
    assert RouterEntropy()(trace_of(one_hot)).item() == 0
    logits = (2 * random(1, E)).requires_grad_()
    (gradient,) = torch.autograd.grad(RouterEntropy()(trace_of(logits)), logits)
    p = logits.detach().softmax(-1)
    entropy = -(p * p.log()).sum()
    close(gradient, -p * (p.log() + entropy), **FLOAT64)


@pytest.mark.parametrize("threshold", [0.0, 0.4, 0.8])
def test_losses_equal_the_reference(threshold) -> None:
    x, W = random(25, D).requires_grad_(), random(E, D).requires_grad_()
    trace = trace_of(x @ W.T, threshold)
    every = [reference.probabilities(x_t, W) for x_t in x]
    chosen = [reference.chosen(p, threshold) for p in every]
    for ours, theirs in (
        (LoadBalance()(trace), reference.balance(every, chosen)),
        (RouterEntropy()(trace), reference.entropy(every)),
    ):
        close(ours, theirs, **FLOAT64)
        mine, wanted = (torch.autograd.grad(loss, (x, W), retain_graph=True) for loss in (ours, theirs))
        for a, b in zip(mine, wanted, strict=True):
            close(a, b, **FLOAT64)


def test_balance_is_switch_s_for_one_expert_and_the_mean_k_when_perfect() -> None:
    logits = 2 * random(60, E)
    switch = E * (torch.bincount(logits.argmax(-1), minlength=E).double() / 60 * logits.softmax(-1).mean(0)).sum()
    close(LoadBalance()(trace_of(logits, 0.0)), switch, **FLOAT64)
    row = torch.linspace(2, -2, E, dtype=torch.float64)
    even = trace_of(torch.stack([row.roll(shift) for shift in range(E)]), 0.6)
    mean_k = even.experts_per_token().double().mean()
    assert mean_k > 1
    close(LoadBalance()(even), mean_k, **FLOAT64)


def test_unselected_experts_learn_nothing_and_their_logits_do() -> None:
    moe, x = layer(0.3), random(1, D)
    y, (trace,) = moe(x)
    (logit_gradient,) = torch.autograd.grad(y.sum(), trace.routing.logits, retain_graph=True)
    y.sum().backward()
    unselected = [e for e in range(E) if e not in trace.routing.expert.tolist()]
    assert unselected and (logit_gradient[0] != 0).all()
    for e in unselected:
        assert all(not parameter.grad[rows].any() for parameter, rows in moe.bank.weights_of(e))


def test_decoding_token_by_token_equals_the_whole_forward() -> None:
    model = Transformer(11, D, [Block(D, Attention(D, 1), layer(0.5)) for _ in range(2)]).double().eval()
    tokens = torch.randint(11, (2, 9))
    whole, cache = model(tokens).logits, Cache()
    steps = [model(tokens[:, i : i + 1], cache=cache).logits for i in range(9)]
    close(torch.cat(steps, 1), whole, **FLOAT64)


def test_the_papers_model_has_3_49_billion_parameters() -> None:
    """24 layers of 16 experts of width 2816 (the paper's 3.5B); with two of them 582 million are active."""
    recipe = load_recipe(ROOT / "recipes" / "paper" / "dynamic-routing-3.5b.yaml")
    model = build_model(recipe, 32_000, "meta")
    experts = sum(p.numel() for moe in model.moe_layers().values() for p in moe.bank.parameters())
    total = sum(p.numel() for p in model.parameters())
    assert round(total / 1e9, 2) == 3.49 and round((total - experts * 14 / 16) / 1e6) == 582
    assert experts == 24 * 16 * 3 * 1024 * 2816
    assert next(iter(model.moe_layers().values())).router.rows_per_token() == 7

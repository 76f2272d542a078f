"""Losses of HMoE and their fixed points (checks 1-4, 9 and 11 of the list in test_hmoe.py)."""

import math
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from moestro.experts import FFNBank
from moestro.experts.widths import arithmetic
from moestro.layers import MoELayer
from moestro.objectives import LoadBalance, Objective, ParameterPenalty, RouterEntropy, RouterZLoss
from moestro.routers import ExpertChoice, LinearScore, ProductKeyRouter, ScoredRouter, Select, Soft, TopK, TopP
from moestro.routers.gates import GATES
from moestro.routing import Trace
from tests.reference import hmoe
from tests.systems.hmoe_layers import grad, make_layer, random
from tests.tolerances import FLOAT64

close = torch.testing.assert_close
N = 8
WIDTHS = arithmetic(N, total=512, multiple_of=4)
Normalize = Literal["mean", "max", "sum", "none"]
NORMALIZE: tuple[Normalize, ...] = ("mean", "max", "sum", "none")
SELECTS: dict[str, tuple[Select, dict]] = {
    "top1": (TopK(1), {"k": 1}),
    "top2": (TopK(2), {"k": 2}),
    "p0.6": (TopP(0.6), {"threshold": 0.6}),
}


def trace_of(logits: Tensor, select: Select, widths: list[int] = WIDTHS) -> Trace:
    """A trace of routing alone: the losses read logits, who was chosen, and widths."""
    layer = MoELayer(ScoredRouter(LinearScore(4, len(widths)), TopK(1)), [FFNBank(4, widths)])
    return Trace(layer, logits.new_zeros(len(logits), 4), select(logits))


def reference_losses(logits: Tensor, arguments: dict) -> list[tuple[Objective, Tensor]]:
    probs = hmoe.router_probabilities(logits, torch.eye(N, dtype=logits.dtype))
    chosen = hmoe.select(probs, **arguments)
    return [
        (LoadBalance(), hmoe.load_balance(probs, chosen)),
        *((ParameterPenalty(n), hmoe.parameter_penalty(probs, chosen, WIDTHS, n)) for n in NORMALIZE),
        (RouterEntropy(), hmoe.router_entropy(probs)),
        (RouterEntropy(scale_by_n=True), hmoe.router_entropy(probs, scale_by_n=True)),
        (RouterEntropy(literal=True), hmoe.printed_entropy(probs)),
        (RouterZLoss(), hmoe.router_z_loss(logits)),
    ]


@pytest.mark.parametrize("n_tokens", [1, 15])
@pytest.mark.parametrize("select", SELECTS)
def test_objectives_equal_the_reference(select: str, n_tokens: int) -> None:
    """Values and gradients with respect to the logits."""
    chooser, arguments = SELECTS[select]
    logits = (2 * random(n_tokens, N)).requires_grad_()
    for objective, theirs in reference_losses(logits, arguments):
        ours = objective(trace_of(logits, chooser))
        close(ours, theirs, **FLOAT64, msg=lambda m, o=objective: f"{o}: {m}")
        mine, expected = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (ours, theirs))
        close(mine, expected, **FLOAT64, msg=lambda m, o=objective: f"gradient of {o}: {m}")


@pytest.mark.parametrize("gate", sorted(GATES))
def test_the_z_loss_is_of_the_logits_whatever_the_gate(gate: str) -> None:
    """Logs of sigmoids are bounded from above: their sum would leave logits as large as they like."""
    logits = (9 * random(7, N)).requires_grad_()
    for select in (TopK(2, gate=gate, renormalize=False), ExpertChoice(2, gate), Soft(gate, "layer")):
        value = RouterZLoss()(trace_of(logits, select))
        close(value, hmoe.router_z_loss(logits), **FLOAT64)
        (slope,) = torch.autograd.grad(value, logits)
        assert (slope.gather(1, logits.argmax(-1, keepdim=True)).abs() > 0.1).all()


def test_objectives_train_the_router_of_a_real_layer() -> None:
    """Through x and the router's weight, and nothing else: experts get no gradient from a loss on routing."""
    layer = make_layer([1, 3, 4, 5, 8], TopP(0.6))
    x = random(11, 6)
    x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    router = layer.router.get_parameter("score.weight")
    router_theirs = router.detach().clone().requires_grad_()
    _, (trace,) = layer(x_ours)
    probs = hmoe.router_probabilities(x_theirs, router_theirs)
    theirs = hmoe.parameter_penalty(probs, hmoe.select(probs, threshold=0.6), [1, 3, 4, 5, 8])
    (ParameterPenalty()(trace) + RouterEntropy()(trace)).backward()
    (theirs + hmoe.router_entropy(probs)).backward()
    close(x_ours.grad, x_theirs.grad, **FLOAT64)
    close(router.grad, router_theirs.grad, **FLOAT64)
    assert all(parameter.grad is None for parameter in layer.bank.parameters())


@pytest.mark.parametrize("select", [TopK(1), TopK(2), TopP(0.6)])
def test_penalty_equals_load_balance_for_equal_sizes(select: Select) -> None:
    """Check 1: exactly for `mean` (and `max`), h times it for `none`, 1/N of it for `sum`."""
    trace = trace_of(2 * random(40, N), select, [24] * N)
    balance = LoadBalance()(trace)
    factors: dict[Normalize, float] = {"mean": 1, "max": 1, "none": 24, "sum": 1 / N}
    for normalize, factor in factors.items():
        close(ParameterPenalty(normalize)(trace), factor * balance, **FLOAT64)


def even_logits() -> Tensor:
    """Every cyclic shift of one row: mean probabilities and loads are exactly even for any k."""
    row = torch.linspace(3, -2, N, dtype=torch.float64)
    return torch.stack([row.roll(shift) for shift in range(N)])


@pytest.mark.parametrize("k", [1, 2, 5])
def test_even_routing_gives_k(k: int) -> None:
    """Check 2: K, not 1, and whatever the mean-normalised sizes are."""
    trace = trace_of(even_logits(), TopK(k))
    expected = torch.tensor(float(k), dtype=torch.float64)
    close(LoadBalance()(trace), expected, **FLOAT64)
    close(ParameterPenalty()(trace), expected, **FLOAT64)
    mean = sum(WIDTHS) / N
    close(ParameterPenalty("none")(trace), expected * mean, **FLOAT64)
    close(ParameterPenalty("max")(trace), expected * mean / max(WIDTHS), **FLOAT64)
    close(ParameterPenalty("sum")(trace), expected / N, **FLOAT64)


def test_penalty_is_free_of_scale_unless_literal() -> None:
    """Check 2: all widths times 3."""
    logits = 2 * random(40, N)
    once, thrice = (trace_of(logits, TopK(2), [c * w for w in WIDTHS]) for c in (1, 3))
    factors: dict[Normalize, float] = {"mean": 1, "max": 1, "sum": 1, "none": 3}
    for normalize, factor in factors.items():
        close(ParameterPenalty(normalize)(thrice), factor * ParameterPenalty(normalize)(once), **FLOAT64)


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("select", SELECTS)
def test_penalty_gradient_equals_its_closed_form(select: str, normalize: Normalize) -> None:
    """Check 3: (N/T) P_tj (M_j - sum_i M_i P_ti); the formula holds f fixed, so a gradient through f would break it."""
    chooser, arguments = SELECTS[select]
    logits = (2 * random(30, N)).requires_grad_()
    probs = logits.detach().softmax(-1)
    expected = hmoe.parameter_penalty_logit_gradient(probs, hmoe.select(probs, **arguments), WIDTHS, normalize)
    ParameterPenalty(normalize)(trace_of(logits, chooser)).backward()
    close(grad(logits), expected, **FLOAT64)


def train_router(objective: Objective, steps: int = 250) -> tuple[Tensor, Tensor]:
    """A bare top-2 router under one loss: (f, mean active width over K times the mean width) at the end."""
    torch.manual_seed(0)
    x, router = torch.randn(2048, 16), ScoredRouter(LinearScore(16, N, init_std=0.3), TopK(2))
    layer = MoELayer(router, [FFNBank(16, WIDTHS)])
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.002, total_iters=steps)
    for _ in range(steps):
        loss = objective(Trace(layer, x, router(x)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    trace = Trace(layer, x, router(x))
    return trace.routing.load() / len(x), trace.active_width().mean() / (2 * sum(WIDTHS) / N)


def test_penalty_alone_equalises_the_compute_of_experts() -> None:
    """Check 4: f_i h_i = const within 2 %; the active width falls to harmonic / arithmetic mean = 0.912."""
    f, width = train_router(ParameterPenalty())
    traffic = f * torch.tensor(WIDTHS)
    assert float((traffic / traffic.mean() - 1).abs().max()) < 0.02
    assert math.isclose(float(width), hmoe.harmonic_over_arithmetic(WIDTHS), rel_tol=0.01)


def test_load_balance_alone_equalises_the_tokens_of_experts() -> None:
    """Check 4: f_i = K/N within 2 %, at the full mean width."""
    f, width = train_router(LoadBalance())
    assert float((f * N / 2 - 1).abs().max()) < 0.02
    assert math.isclose(float(width), 1.0, rel_tol=0.01)


def mean_experts(logits: Tensor) -> float:
    return float(trace_of(logits, TopP(0.6)).experts_per_token().mean())


@pytest.mark.parametrize(("objective", "sign"), [(RouterEntropy(), -1), (RouterEntropy(literal=True), 1)])
def test_one_entropy_step_moves_the_number_of_experts(objective: Objective, sign: int) -> None:
    """Check 11: the right sign lowers Top-P's mean number of experts, the printed one raises it."""
    logits = random(500, N).requires_grad_()
    before = mean_experts(logits)
    objective(trace_of(logits, TopP(0.6))).backward()
    step = 0.5 * grad(logits) / grad(logits).norm(dim=-1, keepdim=True)
    after = mean_experts(logits.detach() - step)
    assert sign * (after - before) > 0.1


def test_the_printed_entropy_drives_top_p_to_as_many_experts_as_possible() -> None:
    """Minimised to the end: 5 of 8 experts reach p = 0.6 when all are equal; the right sign leaves 1."""
    for objective, end in ((RouterEntropy(literal=True), 5.0), (RouterEntropy(), 1.0)):
        logits = random(200, N).requires_grad_()
        optimizer = torch.optim.Adam([logits], lr=0.1)
        for _ in range(120):
            optimizer.zero_grad()
            objective(trace_of(logits, TopP(0.6))).backward()
            optimizer.step()
        assert abs(mean_experts(logits) - end) < 0.1


@pytest.mark.parametrize("objective", [LoadBalance(), ParameterPenalty(), RouterEntropy(), RouterZLoss()])
def test_padding_changes_no_loss(objective: Objective) -> None:
    """Check 9: the loss of a padded batch is the loss of its tokens, and padding gets no gradient from it."""
    layer = make_layer([1, 3, 4, 5, 8], TopP(0.6))
    keep = torch.tensor([[True, True, False, True], [False, True, True, False]])
    x = random(2, 4, 6).requires_grad_()
    _, (padded,) = layer(x, keep)
    _, (alone,) = layer(x.detach()[keep])
    loss = objective(padded)
    close(loss, objective(alone), **FLOAT64)
    loss.backward()
    assert torch.count_nonzero(grad(x)[~keep]) == 0 and torch.count_nonzero(grad(x)[keep]) > 0


@pytest.mark.parametrize("objective", [LoadBalance(), ParameterPenalty(), RouterEntropy(), RouterZLoss()])
def test_losses_of_a_batch_without_tokens_are_zero(objective: Objective) -> None:
    assert float(objective(trace_of(random(0, N), TopP(0.6)))) == 0.0


@pytest.mark.parametrize("objective", [LoadBalance(), ParameterPenalty(), RouterEntropy(), RouterZLoss()])
def test_losses_refuse_routers_without_logits(objective: Objective) -> None:
    routing = ProductKeyRouter(6, 16, heads=2, top_k=2, d_key=4, query_norm="none")(torch.randn(3, 6))
    trace = replace(trace_of(random(3, N), TopK(1)), routing=routing)
    with pytest.raises(ValueError, match="logit"):
        objective(trace)


def test_penalty_refuses_unknown_normalisation() -> None:
    with pytest.raises(ValueError, match="normalize='median', allowed: mean, max, sum, none"):
        ParameterPenalty("median")  # type: ignore[arg-type]

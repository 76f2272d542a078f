"""HMoE layers against `tests/reference/hmoe.py`, in float64: outputs and every single gradient.

Exact checks of arXiv:2408.10681 as our specification numbers them, and where each is tested:
 1 equal sizes = the homogeneous MoE        test_hmoe_identities.py; aux values: test_hmoe_objectives.py
 2-4, 11 penalty and entropy                test_hmoe_objectives.py
 5 Top-P                                    test_hmoe_selection.py
 6 K = N is the soft mixture; permutations  test_hmoe_identities.py
 7 width blocks, zero padding               test_hmoe_identities.py
 8 fast path = loops, expert by expert      here
 9 padding                                  here; in the losses: test_hmoe_objectives.py
10 parameter counts                         test_hmoe_counts.py
12 state dict, conversion, ties             test_hmoe_identities.py; ties: test_hmoe_selection.py
Elsewhere: the compiled and Triton paths of 8, tests/ops/test_native_glu.py and test_triton_ffn*.py (each expert's
gradients, experts with 0, 1 and all tokens, odd widths, 16 bits); the presets of 10, test_recipes.py; the statistics
of 12 over micro-batches and ranks (local unless `statistics: step`), tests/train/test_whole_step.py, test_ranks.py.
"""

import pytest
import torch
from torch import Tensor

from moestro.experts import FFNBank, SharedExpert
from moestro.layers import ActiveRows, DenseFFN, MoELayer
from moestro.ops import backend
from moestro.routers import Select, Soft, TopK, TopP
from moestro.routing import SparseRouting
from tests.reference import hmoe, peer
from tests.systems.hmoe_layers import (
    D,
    assert_same_experts,
    bank_of,
    grad,
    gradient,
    hand_made,
    leaves,
    make_layer,
    random,
    router_weight,
    stored,
    triples,
)
from tests.tolerances import BFLOAT16_NORM, FLOAT64

close = torch.testing.assert_close
WIDTHS = {"rising": [1, 3, 4, 5, 8], "equal": [3, 3, 3, 3, 3], "with a zero expert": [4, 0, 7, 1, 2]}
SELECTS: dict[str, tuple[Select, dict]] = {
    "top1": (TopK(1), {"k": 1}),
    "top2": (TopK(2), {"k": 2}),
    "top2 raw": (TopK(2, renormalize=False), {"k": 2, "renormalize": False}),
    "top5": (TopK(5), {"k": 5}),
    "p0": (TopP(0.0), {"threshold": 0.0}),
    "p0.3": (TopP(0.3), {"threshold": 0.3}),
    "p0.6": (TopP(0.6), {"threshold": 0.6}),
    "p0.6 raw": (TopP(0.6, renormalize=False), {"threshold": 0.6, "renormalize": False}),
    "p1": (TopP(1.0), {"threshold": 1.0 + 1e-9}),
}


def assert_layer_equals_reference(layer: MoELayer, arguments: dict, x: Tensor) -> None:
    """Output and all gradients of a layer and of the reference, compared."""
    cotangent = random(*x.shape)
    x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    router = router_weight(layer)
    router_theirs = router.detach().clone().requires_grad_()
    experts = leaves(bank_of(layer))

    y, (trace,) = layer(x_ours)
    y_theirs, probs, chosen = hmoe.layer(x_theirs, router_theirs, experts, **arguments)
    close(y, y_theirs, **FLOAT64)
    assert trace.experts_per_token().tolist() == [len(members) for members in chosen]
    widths = list(bank_of(layer).widths)
    assert trace.active_width().tolist() == [sum(widths[i] for i in members) for members in chosen]

    (y * cotangent).sum().backward()
    (y_theirs * cotangent).sum().backward()
    close(x_ours.grad, x_theirs.grad, **FLOAT64)
    close(router.grad, router_theirs.grad, **FLOAT64)
    assert_same_experts(bank_of(layer), experts)


@pytest.mark.parametrize("how", ["fused", "reference", "definition"])
@pytest.mark.parametrize("select", SELECTS)
@pytest.mark.parametrize("widths", WIDTHS)
def test_layer_equals_reference(widths: str, select: str, how: str) -> None:
    chooser, arguments = SELECTS[select]
    layer = make_layer(WIDTHS[widths], chooser, record=ActiveRows() if how == "definition" else None)
    with backend.force("reference" if how == "reference" else "fused"):
        assert_layer_equals_reference(layer, arguments, random(9, D))


@pytest.mark.parametrize("how", ["fused", "reference"])
def test_bank_with_idle_and_busy_experts(how: str) -> None:
    """Experts with no token, one token, all tokens, some; a token without experts; widths no tile divides."""
    busy = torch.rand(11, 5) < 0.5
    busy[:, 0], busy[:, 1], busy[:, 2] = False, False, True
    busy[4, 1] = True
    busy[7], busy[10] = False, False
    routing, members = hand_made(busy)
    bank = FFNBank(D, [4, 7, 1, 13, 2]).double()
    x = random(11, D).requires_grad_()
    cotangent = random(11, D)
    with backend.force(how):
        y = bank(x, routing)
        (y * cotangent).sum().backward()

    experts, x_theirs = leaves(bank), x.detach().clone().requires_grad_()
    weight = routing.weight.detach().clone().requires_grad_()
    position = {(int(t), int(e)): n for n, (t, e) in enumerate(zip(routing.token, routing.expert, strict=True))}
    rows = []
    for t in range(11):
        y_t = torch.zeros_like(x_theirs[t])
        for e in members[t]:
            y_t = y_t + weight[position[t, e]] * hmoe.swiglu_expert(x_theirs[t], experts[e])
        rows.append(y_t)
    theirs = torch.stack(rows)
    close(y, theirs, **FLOAT64)
    assert torch.count_nonzero(y[[7, 10]]) == 0
    (theirs * cotangent).sum().backward()
    close(x.grad, x_theirs.grad, **FLOAT64)
    close(routing.weight.grad, weight.grad, **FLOAT64)
    assert_same_experts(bank, experts)
    assert all(torch.count_nonzero(w) == 0 for w in gradient(bank)[0])


@pytest.mark.parametrize("how", ["fused", "reference"])
@pytest.mark.parametrize("name", ["gelu", "relu", "silu", "none"])
def test_mlp_bank_equals_loops(name: str, how: str) -> None:
    """Without a gate: sum of weight * W_out act(W_in x), with each activation."""
    routing, members = hand_made(torch.rand(6, 3) < 0.6)
    bank = FFNBank(D, [2, 5, 3], activation=name, glu=False).double()
    x = random(6, D).requires_grad_()
    with backend.force(how):
        y = bank(x, routing)
    inner, outer = bank.w_in.weight.split([2, 5, 3]), bank.w_out.weight.split([2, 5, 3])
    rows = [torch.zeros(D, dtype=torch.float64) for _ in range(6)]
    for t, e, g in zip(routing.token.tolist(), routing.expert.tolist(), routing.weight, strict=True):
        rows[t] = rows[t] + g * (outer[e].T @ peer.activation(inner[e] @ x[t], name))
    theirs, cotangent = torch.stack(rows), random(6, D)
    close(y, theirs, **FLOAT64)
    wanted = (x, routing.weight, bank.w_in.weight, bank.w_out.weight)
    for ours, expected in zip(
        torch.autograd.grad(y, wanted, cotangent), torch.autograd.grad(theirs, wanted, cotangent), strict=True
    ):
        close(ours, expected, **FLOAT64)


def test_gradients_of_the_fused_pass_by_finite_differences() -> None:
    """No reference at all: the hand-written backward against numerical derivatives."""
    routing, _ = hand_made(torch.rand(4, 3) < 0.7)
    bank = FFNBank(3, [2, 1, 3]).double()

    def call(x: Tensor, weight: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        r = SparseRouting(routing.token, routing.expert, weight, 4, 3)
        return torch.func.functional_call(bank, {"w_in.weight": w_in, "w_out.weight": w_out}, (x, r))

    inputs = (random(4, 3), routing.weight.detach(), bank.w_in.weight.detach(), bank.w_out.weight.detach())
    assert torch.autograd.gradcheck(call, tuple(v.clone().requires_grad_() for v in inputs))


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).norm() / b.norm())


def test_bfloat16_stays_within_the_stated_tolerance() -> None:
    routing, _ = hand_made(torch.rand(32, 5) < 0.5)
    exact = FFNBank(16, [8, 3, 24, 5, 40]).bfloat16().double()
    rounded = FFNBank(16, [8, 3, 24, 5, 40]).bfloat16()
    rounded.load_state_dict(exact.state_dict())
    x = random(32, 16).bfloat16()
    weight = routing.weight.detach().abs().bfloat16()
    results = []
    for bank, dtype in ((exact, torch.float64), (rounded, torch.bfloat16)):
        leaf = x.to(dtype).requires_grad_()
        r = SparseRouting(routing.token, routing.expert, weight.to(dtype), 32, 5)
        y = bank(leaf, r)
        assert y.dtype == dtype
        y.sum().backward()
        results.append((y.detach(), leaf.grad, gradient(bank)))
    (y, dx, experts), (y16, dx16, experts16) = results
    assert relative(y16, y) < BFLOAT16_NORM and relative(dx16, dx) < BFLOAT16_NORM
    for ours, theirs in zip(experts16, experts, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert relative(a, b) < BFLOAT16_NORM


@pytest.mark.parametrize("select", [TopK(2), TopP(0.6)])
def test_autocast_keeps_choices_and_gradients(select: Select) -> None:
    """Choices and gates are float32's to the bit; gradients are float32 and within the stated tolerance."""
    layer, x, cotangent = make_layer([8, 3, 24, 5, 40], select).float(), random(64, D).float(), random(64, D).float()
    results = []
    for enabled in (False, True):
        layer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y, (trace,) = layer(x)
        assert y.dtype == (torch.bfloat16 if enabled else torch.float32)
        y.backward(cotangent.to(y.dtype))
        results.append((trace.routing.dense(), [grad(parameter) for parameter in layer.parameters()]))
    (gates, plain), (gates16, lowered) = results
    assert torch.equal(gates, gates16)
    for a, b in zip(lowered, plain, strict=True):
        assert a.dtype == torch.float32 and relative(a, b.double()) < BFLOAT16_NORM


def test_router_decides_in_float32_for_bfloat16_tokens() -> None:
    layer = make_layer([3, 4, 5], TopK(2)).bfloat16()
    _, (trace,) = layer(random(5, D).bfloat16())
    assert trace.routing.logits.dtype == torch.float32


def test_shared_branch_is_added_to_the_routed_ones() -> None:
    layer = make_layer([2, 5, 3], TopK(2))
    shared = SharedExpert(D, 7).double()
    both = MoELayer(layer.router, [bank_of(layer), shared])
    x, cotangent = random(8, D).requires_grad_(), random(8, D)
    y, _ = both(x)
    gate, up = shared.w_in.weight.chunk(2)
    routed, _, _ = hmoe.layer(x, router_weight(layer), triples(*stored(bank_of(layer)), [2, 5, 3]), k=2)
    theirs = routed + torch.stack([hmoe.swiglu_expert(x_t, (gate, up, shared.w_out.weight)) for x_t in x])
    close(y, theirs, **FLOAT64)
    wanted = [x, *both.parameters()]
    for a, b in zip(
        torch.autograd.grad(y, wanted, cotangent), torch.autograd.grad(theirs, wanted, cotangent), strict=True
    ):
        close(a, b, **FLOAT64)


def test_dense_ffn_is_one_expert_for_every_token() -> None:
    dense = DenseFFN(D, 5).double()
    x = random(2, 3, D)
    y, traces = dense(x)
    gate, up = dense.expert.w_in.weight.chunk(2)
    expected = torch.stack([hmoe.swiglu_expert(x_t, (gate, up, dense.expert.w_out.weight)) for x_t in x.flatten(0, 1)])
    close(y, expected.view(2, 3, D), **FLOAT64)
    assert traces == ()


@pytest.mark.parametrize("select", [TopK(2), TopP(0.6), Soft()])
def test_padding_tokens_get_zeros_and_reach_nobody(select: Select) -> None:
    """Check 9: what stands in padded places changes nothing, their gradient is zero, nobody counts them."""
    layer = make_layer([2, 5, 3], select)
    keep = torch.tensor([[True, True, False, True], [False, True, True, False]])
    x = random(2, 4, D)
    alone, _ = layer(x[keep])
    for filler in (x, x.masked_fill(~keep[..., None], 1e30)):
        leaf = filler.clone().requires_grad_()
        y, (trace,) = layer(leaf, keep)
        close(y[keep], alone, **FLOAT64)
        assert torch.count_nonzero(y[~keep]) == 0
        assert trace.routing.n_tokens == 5 and trace.x.shape == (5, D)
        y.sum().backward()
        assert torch.count_nonzero(grad(leaf)[~keep]) == 0 and torch.count_nonzero(grad(leaf)[keep]) > 0


def test_batch_of_padding_only() -> None:
    layer = make_layer([2, 5, 3], TopP(0.6))
    y, _ = layer(random(2, 3, D), torch.zeros(2, 3, dtype=torch.bool))
    assert torch.equal(y, torch.zeros(2, 3, D, dtype=torch.float64))

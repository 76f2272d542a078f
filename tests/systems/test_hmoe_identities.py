"""Things an HMoE layer must equal by algebra alone (checks 1, 6, 7 and 12 of the list in test_hmoe.py)."""

import math

import pytest
import torch

from moestro.experts import FFNBank
from moestro.routers import Select, Soft, TopK, TopP
from moestro.routing import SparseRouting
from tests.systems.hmoe_layers import D, bank_of, grad, gradient, hand_made, make_layer, random, router_weight, triples
from tests.tolerances import FLOAT64

RISING = [1, 3, 4, 5, 8]
close = torch.testing.assert_close


@pytest.mark.parametrize("k", [1, 2, 4])
def test_equal_widths_are_the_homogeneous_mixture(k: int) -> None:
    """Check 1: the textbook batched top-k MoE on stacked [e, w, d] weights, outputs and all gradients."""
    e, w = 4, 5
    layer = make_layer([w] * e, TopK(k))
    x, cotangent = random(10, D), random(10, D)
    x_ours = x.clone().requires_grad_()
    y, _ = layer(x_ours)
    (y * cotangent).sum().backward()

    bank = bank_of(layer)
    router = router_weight(layer).detach().clone().requires_grad_()
    w_in = bank.w_in.weight.detach().clone().view(e, 2, w, D).requires_grad_()
    w_out = bank.w_out.weight.detach().clone().view(e, w, D).requires_grad_()
    x_theirs = x.clone().requires_grad_()
    top, index = (x_theirs @ router.T).softmax(-1).topk(k, dim=-1)
    gates = torch.zeros(10, e, dtype=x.dtype).scatter(1, index, top / top.sum(-1, keepdim=True))
    gate, up = torch.einsum("td,egwd->getw", x_theirs, w_in)
    outputs = torch.einsum("etw,ewd->etd", torch.nn.functional.silu(gate) * up, w_out)
    theirs = torch.einsum("te,etd->td", gates, outputs)
    close(y, theirs, **FLOAT64)
    (theirs * cotangent).sum().backward()
    close(x_ours.grad, x_theirs.grad, **FLOAT64)
    close(router_weight(layer).grad, router.grad, **FLOAT64)
    close(grad(bank.w_in.weight).view_as(w_in), w_in.grad, **FLOAT64)
    close(grad(bank.w_out.weight).view_as(w_out), w_out.grad, **FLOAT64)


def test_all_experts_chosen_is_the_soft_mixture() -> None:
    """Check 6: K = N, p = 1 and the soft selection are one function with one gradient."""
    layer = make_layer(RISING, TopK(5))
    x, cotangent = random(7, D), random(7, D)
    results = []
    for select in (TopK(5), TopP(1.0), Soft()):
        other = make_layer(RISING, select)
        other.load_state_dict(layer.state_dict())
        y, _ = other(x)
        results.append((y, *torch.autograd.grad(y, list(other.parameters()), cotangent)))
    for result in results[1:]:
        for a, b in zip(results[0], result, strict=True):
            close(a, b, **FLOAT64)


@pytest.mark.parametrize("select", [TopK(2), TopP(0.6)])
def test_permuting_experts_and_sizes_changes_nothing(select: Select) -> None:
    layer, x = make_layer(RISING, select), random(20, D)
    before, (trace,) = layer(x)
    width = trace.active_width()
    order = torch.tensor([3, 0, 4, 2, 1])
    layer.reindex(order)
    assert bank_of(layer).widths == (5, 1, 8, 4, 3)
    after, (permuted,) = layer(x)
    close(after, before, **FLOAT64)
    assert torch.equal(permuted.routing.load(), trace.routing.load()[order])
    close(permuted.active_width(), width)


def test_splitting_experts_into_blocks_of_their_common_divisor_changes_nothing() -> None:
    """Check 7: a SwiGLU expert of width h is the sum of h/b experts of width b under the same gate."""
    widths = [4, 6, 2, 10]
    b = math.gcd(*widths)
    bank, blocks = FFNBank(D, widths).double(), FFNBank(D, [b] * (sum(widths) // b)).double()
    pieces = []
    with torch.no_grad():
        for gate, up, _ in triples(bank.w_in.weight, bank.w_out.weight, widths):
            pieces += [torch.cat(pair) for pair in zip(gate.split(b), up.split(b), strict=True)]
        blocks.w_in.weight.copy_(torch.cat(pieces))
        blocks.w_out.weight.copy_(bank.w_out.weight)
    routing, _ = hand_made(torch.rand(9, 4) < 0.5)
    rows = [
        (t, sum(widths[:e]) // b + block, n)
        for n, (t, e) in enumerate(zip(routing.token.tolist(), routing.expert.tolist(), strict=True))
        for block in range(widths[e] // b)
    ]
    token, expert, row = (torch.tensor(column) for column in zip(*rows, strict=True))
    x = random(9, D).requires_grad_()
    y = bank(x, routing)
    split = blocks(x, SparseRouting(token, expert, routing.weight[row], 9, blocks.n_experts))
    close(split, y, **FLOAT64)
    cotangent = random(9, D)
    ours = torch.autograd.grad(y, [x, routing.weight, bank.w_out.weight, bank.w_in.weight], cotangent)
    theirs = torch.autograd.grad(split, [x, routing.weight, blocks.w_out.weight, blocks.w_in.weight], cotangent)
    for a, c in zip(ours[:3], theirs[:3], strict=True):
        close(a, c, **FLOAT64)
    experts = theirs[3].split([2 * width for width in widths])
    back = [expert.view(-1, 2, b, D).transpose(0, 1).reshape(-1, D) for expert in experts]
    close(ours[3], torch.cat(back), **FLOAT64)


def test_zero_padding_experts_to_the_widest_changes_nothing() -> None:
    """Check 7: and the padding's gradient is exactly zero."""
    widths, widest = [4, 6, 2, 10], 10
    bank, padded = FFNBank(D, widths).double(), FFNBank(D, [widest] * 4).double()
    with torch.no_grad():
        padded.w_in.weight.zero_()
        padded.w_out.weight.zero_()
        small = triples(bank.w_in.weight, bank.w_out.weight, widths)
        large = triples(padded.w_in.weight, padded.w_out.weight, [widest] * 4)
        for width, (gate, up, down), (big_gate, big_up, big_down) in zip(widths, small, large, strict=True):
            big_gate[:width], big_up[:width], big_down[:, :width] = gate, up, down
    routing, _ = hand_made(torch.rand(9, 4) < 0.6)
    x, cotangent = random(9, D), random(9, D)
    y, y_padded = bank(x, routing), padded(x, routing)
    close(y_padded, y, **FLOAT64)
    (y * cotangent).sum().backward()
    (y_padded * cotangent).sum().backward()
    for width, ours, theirs in zip(widths, gradient(bank), gradient(padded), strict=True):
        for name, a, c in zip("gpo", ours, theirs, strict=True):
            c = c.T if name == "o" else c
            close(c[:width], a.T if name == "o" else a, **FLOAT64)
            assert torch.count_nonzero(c[width:]) == 0


def test_state_dict_round_trip() -> None:
    layer, other = make_layer([2, 5, 3], TopP(0.6)), make_layer([2, 5, 3], TopP(0.6))
    x = random(20, D)
    assert not torch.equal(layer(x)[0], other(x)[0])
    other.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(layer(x)[0], other(x)[0])
    with pytest.raises(RuntimeError, match="w_in.weight"):
        make_layer([2, 5, 4], TopP(0.6)).load_state_dict(layer.state_dict())


def test_stacked_homogeneous_weights_convert_without_loss() -> None:
    """Check 12: [e, 2w, d] and [e, w, d] stacks are the equal-width storage itself, there and back."""
    bank = FFNBank(D, [4, 4, 4]).double()
    stacks = bank.w_in.weight.detach().view(3, 8, D).clone(), bank.w_out.weight.detach().view(3, 4, D).clone()
    other = FFNBank(D, [4, 4, 4]).double()
    other.load_state_dict({"w_in.weight": stacks[0].flatten(0, 1), "w_out.weight": stacks[1].flatten(0, 1)})
    routing, _ = hand_made(torch.rand(6, 3) < 0.7)
    x = random(6, D)
    assert torch.equal(other(x, routing), bank(x, routing))
    for ours, stack in zip(bank.w_in.matrices(), stacks[0], strict=True):
        assert torch.equal(ours, stack)

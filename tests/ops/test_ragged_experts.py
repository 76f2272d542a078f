"""Experts of several widths fetched by id, against their definition: outputs and every gradient."""

import pytest
import torch

from moestro import ops
from moestro.ops import backend
from tests.ops.test_singleton_experts import inputs
from tests.tolerances import BFLOAT16_NORM, FLOAT64

CASES = {
    "one": ((1, 1, 1, 4), [3]),
    "63 tokens": ((63, 5, 49, 12), [1, 2, 4, 1, 7, 1, 2] * 7),
    "an expert without neurons": ((30, 4, 5, 6), [2, 0, 1, 0, 3]),
    "only that": ((3, 2, 2, 6), [0, 5]),
    "more rows than a chunk": ((200, 8, 64, 8), [1, 1, 2, 4] * 16),
    "no tokens": ((0, 4, 3, 8), [1, 2, 1]),
}


def arguments(case: str, dtype: torch.dtype = torch.float64):
    sizes, widths = CASES[case]
    x, ids, weight, _, _ = inputs(*sizes, dtype)
    if case == "only that":
        ids = torch.zeros_like(ids)
    _, _, _, up, down = inputs(1, 1, sum(widths), sizes[3], dtype)
    return x, ids, weight, torch.tensor([0, *widths]).cumsum(0), up, down


def run(made, name="fused", activation="gelu", sparse=False):
    x, ids, weight, starts, up, down = made
    leaves = [v.detach().clone().requires_grad_() for v in (x, weight, up, down)]
    with backend.force(name):
        y = ops.ragged_experts(leaves[0], ids, leaves[1], starts, *leaves[2:], activation, sparse)
    (y * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return y, [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu", "none"])
@pytest.mark.parametrize("case", CASES)
def test_fused_equals_definition(case, activation, sparse):
    made = arguments(case)
    want, want_gradients = run(made, "reference", activation, sparse)
    have, have_gradients = run(made, "fused", activation, sparse)
    torch.testing.assert_close(have, want, **FLOAT64)
    assert [g.is_sparse for g in have_gradients] == [False, False, sparse, sparse]
    for mine, theirs in zip(have_gradients, want_gradients, strict=True):
        torch.testing.assert_close(mine.to_dense(), theirs.to_dense(), **FLOAT64)


def test_experts_of_one_neuron_are_singletons_to_the_last_digits():
    x, ids, weight, up, down = made = inputs(63, 5, 49, 12)
    y, gradients = run((x, ids, weight, torch.arange(50), up, down))
    leaves = [v.clone().requires_grad_() if v.is_floating_point() else v for v in made]
    want = ops.singleton_experts(*leaves, "gelu")
    torch.testing.assert_close(y, want, **FLOAT64)
    (want * torch.linspace(0.5, 1.5, want.numel(), dtype=want.dtype).view_as(want)).sum().backward()
    for mine, leaf in zip(gradients, [leaves[i] for i in (0, 2, 3, 4)], strict=True):
        torch.testing.assert_close(mine, leaf.grad, **FLOAT64)


def test_rows_of_the_gradient_are_the_neurons_met():
    _, ids, _, starts, up, _ = made = arguments("63 tokens")
    _, (_, _, up_gradient, down_gradient) = run(made, sparse=True)
    met = torch.cat([torch.arange(starts[e], starts[e + 1]) for e in ids.unique()])
    for gradient in (up_gradient, down_gradient):
        assert torch.equal(gradient._indices()[0], met) and gradient.shape == up.shape


def test_memory_saved_for_backward_does_not_grow_with_gathered_rows():
    x, ids, weight, _, _ = inputs(64, 16, 512, 64)
    starts = torch.tensor([0, *[1, 2, 4, 1] * 128]).cumsum(0)
    _, _, _, up, down = inputs(1, 1, 1024, 64)
    made = [x.requires_grad_(), ids, weight.requires_grad_(), starts, up.requires_grad_(), down.requires_grad_()]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.ragged_experts(*made, "gelu")
    held = {v.data_ptr() for v in made}
    assert sum(t.numel() for t in saved if t.data_ptr() not in held) == starts.diff()[ids].sum()


@pytest.mark.parametrize("sparse", [True, False])
def test_autocast_rounds_the_output(sparse):
    made = arguments("63 tokens", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = run(made, sparse=sparse)
    exact, _ = run([v.double() if v.is_floating_point() else v for v in made])
    assert y.dtype == torch.bfloat16
    assert 0 < (y.double() - exact).norm() / exact.norm() < BFLOAT16_NORM

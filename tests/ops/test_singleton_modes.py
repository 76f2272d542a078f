"""One-neuron experts with a third table, and plain values, against their definitions: outputs and every gradient."""

import pytest
import torch

from moestro import ops
from moestro.ops import backend
from tests.ops.test_singleton_experts import CASES, inputs
from tests.tolerances import BFLOAT16_NORM, FLOAT64


def glu(x, ids, weight, up, down, gate, activation="silu", sparse=False):
    return ops.singleton_experts(x, ids, weight, up, down, activation, sparse, gate)


def values(x, ids, weight, up, down, gate, activation="silu", sparse=False):
    return ops.value_rows(ids, weight, down, sparse)


def arguments(case, dtype=torch.float64):
    made = inputs(*CASES[case], dtype)
    return (*made, torch.randn(made[3].shape, generator=torch.Generator().manual_seed(1)).to(dtype))


def run(mode, made, name="fused", **how):
    leaves = [v.detach().clone().requires_grad_(v.is_floating_point()) for v in made]
    with backend.force(name):
        y = mode(*leaves, **how)
    (y * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return y, [leaf.grad for leaf in leaves if leaf.grad is not None]


modes = pytest.mark.parametrize("mode", [glu, values])


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu", "none"])
@pytest.mark.parametrize("case", CASES)
@modes
def test_fused_equals_definition(mode, case, activation):
    made = arguments(case)
    want, want_gradients = run(mode, made, "reference", activation=activation)
    have, have_gradients = run(mode, made, "fused", activation=activation)
    torch.testing.assert_close(have, want, **FLOAT64)
    assert len(want_gradients) == (5 if mode is glu else 2)
    for mine, theirs in zip(have_gradients, want_gradients, strict=True):
        torch.testing.assert_close(mine, theirs, **FLOAT64)


@pytest.mark.parametrize("case", CASES)
@modes
def test_rows_are_those_of_the_dense_gradient_to_the_bit(mode, case):
    made = arguments(case)
    y, gradients = run(mode, made, sparse=True)
    dense_y, dense_gradients = run(mode, made)
    assert torch.equal(y, dense_y)
    assert sum(g.is_sparse for g in gradients) == (3 if mode is glu else 1)
    for mine, theirs in zip(gradients, dense_gradients, strict=True):
        assert torch.equal(mine.to_dense(), theirs)
        if mine.is_sparse:
            assert torch.equal(mine.coalesce().indices()[0], made[1].unique())


@modes
def test_memory_saved_for_backward_does_not_grow_with_gathered_rows(mode):
    n_tokens, k, d = 64, 32, 64
    made = [v.requires_grad_() if v.is_floating_point() else v for v in inputs(n_tokens, k, 1024, d)]
    made.append(torch.randn(1024, d, dtype=torch.float64, requires_grad=True))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        mode(*made)
    held = {v.data_ptr() for v in made}
    assert sum(t.numel() for t in saved if t.data_ptr() not in held) <= 3 * n_tokens * k


@pytest.mark.parametrize("sparse", [True, False])
@modes
def test_autocast_rounds_the_output(mode, sparse):
    made = arguments("63 tokens", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = run(mode, made, sparse=sparse)
    exact, _ = run(mode, [v.double() if v.is_floating_point() else v for v in made])
    assert y.dtype == torch.bfloat16
    assert 0 < (y.double() - exact).norm() / exact.norm() < BFLOAT16_NORM

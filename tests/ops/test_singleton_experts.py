"""One-neuron experts fetched by id, against their definition: outputs and every gradient."""

import pytest
import torch

from moestro import ops
from moestro.ops import backend
from tests.tolerances import FLOAT32, FLOAT64


def inputs(n_tokens: int, k: int, n_experts: int, d: int, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(n_tokens * k)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    ids = torch.randint(n_experts, (n_tokens, k), generator=generator)
    return draw(n_tokens, d), ids, draw(n_tokens, k), draw(n_experts, d), draw(n_experts, d)


def outputs_and_gradients(name: str, arguments, activation: str):
    x, ids, weight, up, down = arguments
    leaves = [v.detach().clone().requires_grad_() for v in (x, weight, up, down)]
    with backend.force(name):
        y = ops.singleton_experts(leaves[0], ids, leaves[1], leaves[2], leaves[3], activation)
    (y * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return y, [leaf.grad for leaf in leaves]


CASES = {
    "one": (1, 1, 1, 4),
    "63 tokens": (63, 5, 49, 12),
    "many tokens to few experts": (100, 8, 3, 7),
    "more rows than a chunk": (300, 16, 1024, 8),
    "no tokens": (0, 4, 9, 8),
}


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu", "none"])
@pytest.mark.parametrize("case", CASES)
def test_fused_equals_definition_in_float64(case, activation):
    arguments = inputs(*CASES[case])
    want, want_gradients = outputs_and_gradients("reference", arguments, activation)
    have, have_gradients = outputs_and_gradients("fused", arguments, activation)
    torch.testing.assert_close(have, want, **FLOAT64)
    for have_gradient, want_gradient in zip(have_gradients, want_gradients, strict=True):
        torch.testing.assert_close(have_gradient, want_gradient, **FLOAT64)


def test_fused_in_float32_is_close_to_float64():
    arguments = inputs(*CASES["63 tokens"], torch.float32)
    wide = [v.double() if v.is_floating_point() else v for v in arguments]
    want, want_gradients = outputs_and_gradients("reference", wide, "gelu")
    have, have_gradients = outputs_and_gradients("fused", arguments, "gelu")
    torch.testing.assert_close(have.double(), want, **FLOAT32)
    for have_gradient, want_gradient in zip(have_gradients, want_gradients, strict=True):
        torch.testing.assert_close(have_gradient.double(), want_gradient, **FLOAT32)


def test_an_expert_met_twice_by_one_token_counts_twice_and_idle_rows_have_no_gradient():
    x, _, weight, up, down = inputs(2, 2, 5, 4)
    ids = torch.tensor([[3, 3], [3, 1]])
    _, (_, _, up_gradient, down_gradient) = outputs_and_gradients("fused", (x, ids, weight, up, down), "gelu")
    _, (_, _, want_up, want_down) = outputs_and_gradients("reference", (x, ids, weight, up, down), "gelu")
    torch.testing.assert_close(up_gradient, want_up, **FLOAT64)
    torch.testing.assert_close(down_gradient, want_down, **FLOAT64)
    for idle in (0, 2, 4):
        assert not up_gradient[idle].any()
        assert not down_gradient[idle].any()


def test_memory_saved_for_backward_does_not_grow_with_gathered_rows():
    n_tokens, k, d = 64, 32, 64
    arguments = [v.requires_grad_() if v.is_floating_point() else v for v in inputs(n_tokens, k, 1024, d)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.singleton_experts(*arguments, "gelu")
    inputs_held = {v.data_ptr() for v in arguments}
    extra = sum(t.numel() for t in saved if t.data_ptr() not in inputs_held)
    assert extra <= 2 * n_tokens * k

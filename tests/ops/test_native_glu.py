"""silu(gate) * up on compiled kernels: against float64, on every variant, and inside the expert feed-forward."""

import pytest
import torch
import torch.nn.functional as F

from moestro.ops import backend, glu, native
from tests.ops.test_expert_ffn import CASES, inputs, outputs_and_gradients
from tests.tolerances import BFLOAT16_NORM, FLOAT32

pytestmark = pytest.mark.skipif(native.library().handle is None, reason=f"native kernels {native.status()}")
ROUNDED = {torch.float32: 2**-21, torch.bfloat16: 2**-8}


def forward_and_backward(z, dhidden, weight):
    """hidden, and weight * hidden, dz and dweight, in memory that was NaN."""
    n, width = dhidden.shape
    hidden, scaled = (torch.full_like(dhidden, float("nan")) for _ in range(2))
    dz, dweight = torch.full_like(z, float("nan")), torch.full_like(weight, float("nan"))
    glu.hidden(z, hidden, "silu")
    glu.hidden_backward(dhidden.clone(), z, weight, dz, scaled, dweight, "silu")
    assert hidden.shape == scaled.shape == (n, width)
    return hidden, scaled, dz, dweight


def in_float64(z, dhidden, weight):
    z, weight = z.double().requires_grad_(), weight.double().requires_grad_()
    gate, up = z.chunk(2, dim=1)
    hidden = F.silu(gate) * up
    dz, dweight = torch.autograd.grad(weight[:, None] * hidden, [z, weight], dhidden.double())
    return hidden.detach(), (weight[:, None] * hidden).detach(), dz, dweight


@pytest.mark.parametrize("variant", native.variants())
@pytest.mark.parametrize("dtype", list(ROUNDED))
@pytest.mark.parametrize(("n", "width"), [(1, 1), (3, 5), (40, 16), (7, 33), (5, 100), (0, 8)])
def test_equals_float64(n, width, dtype, variant):
    generator = torch.Generator().manual_seed(width)
    shapes = [(n, 2 * width), (n, width), (n,)]
    z, dhidden, weight = (torch.randn(*shape, generator=generator).mul_(4).to(dtype) for shape in shapes)
    with backend.force("native"), native.variant(variant):
        have = forward_and_backward(z, dhidden, weight)
    for index, (mine, true) in enumerate(zip(have, in_float64(z, dhidden, weight), strict=True)):
        assert mine.dtype == dtype
        # the sum of a row rounds as its largest summands do
        size = true.abs() if index < 3 else (dhidden.double() * in_float64(z, dhidden, weight)[0]).abs().sum(-1)
        assert ((mine.double() - true).abs() <= 4 * ROUNDED[dtype] * size + 1e-6).all(), index


@pytest.mark.parametrize("variant", native.variants())
def test_large_and_missing_numbers(variant):
    gate = torch.tensor([[-1e4, -100.0, -88.0, -0.0, 0.0, 88.0, 100.0, 1e4, float("inf"), float("nan")]])
    z = torch.cat([gate, torch.ones_like(gate)], dim=1)
    out = torch.empty_like(gate)
    with backend.force("native"), native.variant(variant):
        glu.hidden(z, out, "silu")
    torch.testing.assert_close(out, F.silu(gate), rtol=1e-6, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("case", CASES)
def test_experts_equal_the_definition(case):
    arguments = inputs(*CASES[case], 2, torch.float32)
    wide = [v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in arguments]
    want, want_gradients = outputs_and_gradients("reference", wide, "silu")
    have, have_gradients = outputs_and_gradients("native", arguments, "silu")
    for mine, true in zip([have, *have_gradients], [want, *want_gradients], strict=True):
        torch.testing.assert_close(mine.double(), true, **FLOAT32)


def test_experts_in_bfloat16():
    arguments = inputs(*CASES["every expert its own width"], 2, torch.float64)
    sixteen = [v.bfloat16() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in arguments]
    wide = [v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in sixteen]
    want, want_gradients = outputs_and_gradients("reference", wide, "silu")
    have, have_gradients = outputs_and_gradients("native", sixteen, "silu")
    for mine, true in zip([have, *have_gradients], [want, *want_gradients], strict=True):
        assert (mine.double() - true).norm() <= BFLOAT16_NORM * true.norm()


@pytest.mark.parametrize("dtype", list(ROUNDED))
def test_threads_change_no_bit(two_threads, dtype):
    z, dhidden, weight = (torch.randn(50, n).to(dtype) for n in (74, 37, 1))
    with backend.force("native"):
        several = forward_and_backward(z, dhidden, weight[:, 0].contiguous())
        torch.set_num_threads(1)
        one = forward_and_backward(z, dhidden, weight[:, 0].contiguous())
    assert all(torch.equal(a, b) for a, b in zip(several, one, strict=True))


def test_other_activations_and_dtypes_run_without_kernels(monkeypatch):
    def refused(*_):
        raise AssertionError("a kernel was called")

    monkeypatch.setattr("moestro.ops.native.run", refused)
    z = torch.randn(3, 8)
    with backend.force("native"):
        glu.hidden(z, torch.empty(3, 4), "gelu")
        glu.hidden(z, torch.empty(3, 8), "silu")
        glu.hidden(z.double(), torch.empty(3, 4, dtype=torch.float64), "silu")
        with pytest.raises(AssertionError, match="a kernel was called"):
            glu.hidden(z, torch.empty(3, 4), "silu")

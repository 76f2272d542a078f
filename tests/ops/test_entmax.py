"""entmax-1.5: the checks of muMoE's specification (its number 5), and the definition."""

import math

import pytest
import torch

from moestro.ops import backend, entmax15
from tests.reference import mumoe as reference
from tests.tolerances import FLOAT32, FLOAT64

BACKENDS = pytest.mark.parametrize("name", backend.EVERYWHERE)


def logits(rows: int = 64, columns: int = 11, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@BACKENDS
def test_it_equals_the_equations(name: str) -> None:
    z = logits().requires_grad_()
    weight = torch.linspace(-1, 1, z.numel(), dtype=z.dtype).view_as(z)
    with backend.force(name):
        have = entmax15(z)
        (have_gradient,) = torch.autograd.grad((have * weight).sum(), z)
    want = torch.stack([reference.entmax15(row) for row in z])
    (want_gradient,) = torch.autograd.grad((want * weight).sum(), z)
    torch.testing.assert_close(have, want, **FLOAT64)
    torch.testing.assert_close(have_gradient, want_gradient, **FLOAT64)


def test_rows_are_probabilities_with_exact_zeros() -> None:
    z = logits()
    p = entmax15(z)
    torch.testing.assert_close(p.sum(-1), torch.ones(64, dtype=p.dtype), **FLOAT64)
    assert (p >= 0).all() and 0.1 < (p == 0).double().mean() < 0.9


def test_the_support_has_one_threshold() -> None:
    """sqrt(p) - z / 2 is constant on it, and no logit outside lies above."""
    z = logits()
    for p, row in zip(entmax15(z), z, strict=True):
        tau = (row / 2 - p.sqrt())[p > 0]
        torch.testing.assert_close(tau, tau[:1].expand_as(tau), **FLOAT64)
        assert (row[p == 0] / 2 <= tau[0]).all()


def test_its_jacobian_is_right() -> None:
    assert torch.autograd.gradcheck(entmax15, logits(5, 7).requires_grad_())


def test_one_expert_gets_everything_exactly() -> None:
    assert torch.equal(entmax15(logits(5, 1).float()), torch.ones(5, 1))


@pytest.mark.parametrize("n", [2, 3, 7, 64, 1000])
def test_equal_logits_are_shared_exactly(n: int) -> None:
    p = entmax15(torch.zeros(2, n))
    assert (p == p[0, 0]).all() and p[0, 0].item() == pytest.approx(1 / n, rel=1e-6)


def test_a_shift_changes_nothing() -> None:
    z = logits()
    torch.testing.assert_close(entmax15(z + 100), entmax15(z), **FLOAT64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    z = (1000 * logits(columns=300)).to(dtype).requires_grad_()
    p = entmax15(z)
    (gradient,) = torch.autograd.grad(p.square().sum(), z)
    assert p.dtype == torch.float32 and torch.isfinite(p).all() and torch.isfinite(gradient).all()
    torch.testing.assert_close(p.sum(-1), torch.ones(64), **FLOAT32)


@BACKENDS
def test_what_is_not_available_gets_nothing_and_disturbs_nothing(name: str) -> None:
    z = logits()
    absent = torch.arange(11) % 3 == 0
    with backend.force(name):
        p = entmax15(z.masked_fill(absent, -math.inf))
        torch.testing.assert_close(p[:, ~absent], entmax15(z[:, ~absent]), **FLOAT64)
        assert not p[:, absent].any()


@BACKENDS
def test_gradients_are_finite_where_logits_are_not(name: str) -> None:
    z = logits().requires_grad_()
    with backend.force(name):
        p = entmax15(z.masked_fill(torch.arange(11) == 4, -math.inf))
        (gradient,) = torch.autograd.grad(p.square().sum(), z)
    assert torch.isfinite(gradient).all() and not gradient[:, 4].any()

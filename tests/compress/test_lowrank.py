"""Low-rank factors of matrices and their ranks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moestro.compress.lowrank import allocate_ranks, factors, rank_keeping
from tests.tolerances import FLOAT64


def matrix(m=12, n=9, seed=0, dtype=torch.float64):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("shape", [(12, 9), (9, 12)])
def test_the_error_is_that_of_the_singular_values_left_out(shape):
    w = matrix(*shape)
    values = torch.linalg.svdvals(w)
    for rank in range(1, 10):
        a, b = factors(w, rank)
        assert a.shape == (shape[0], rank) and b.shape == (rank, shape[1])
        torch.testing.assert_close((w - a @ b).norm(), values[rank:].norm(), rtol=1e-9, atol=1e-12)


def test_full_rank_is_the_matrix_also_in_float32():
    w = 0.02 * matrix(140, 200, dtype=torch.float32)
    a, b = factors(w, 140)
    assert a.dtype == torch.float32
    torch.testing.assert_close(a @ b, w, rtol=1e-5, atol=1e-5 * 0.02)


def test_whitened_factors_have_the_least_error_of_outputs():
    w, x = matrix(), matrix(50, 9, seed=1) @ torch.diag(torch.logspace(-2, 1, 9, dtype=torch.float64))
    plain, white = (torch.matmul(*factors(w, 4, moments, 0.0)) for moments in (None, x.T @ x))
    error = lambda near: float((x @ (w - near).T).norm())  # noqa: E731
    assert error(white) < 0.5 * error(plain)
    # the least possible error: the singular values of X W' beyond the fourth
    assert error(white) == pytest.approx(float(torch.linalg.svdvals(x @ w.T)[4:].norm()), rel=1e-9)
    # means instead of sums change nothing, and full rank is the matrix
    torch.testing.assert_close(torch.matmul(*factors(w, 4, x.T @ x / 50, 0.0)), white, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(torch.matmul(*factors(w, 9, x.T @ x, 0.0)), w, rtol=1e-7, atol=1e-9)


def test_moments_of_too_few_inputs_and_of_none_are_no_error():
    w, x = matrix(), matrix(3, 9, seed=1)
    for moments in (x.T @ x, torch.zeros(9, 9, dtype=torch.float64)):
        torch.testing.assert_close(torch.matmul(*factors(w, 9, moments)), w, **FLOAT64 | {"rtol": 1e-5, "atol": 1e-7})


def test_ranks_that_keep_a_fraction():
    # below these, factors have fewer parameters than the matrix (papers' sizes)
    for (m, n), even in {(14336, 4096): 3185.8, (1408, 2048): 834.4, (1024, 2048): 682.7}.items():
        assert rank_keeping(1.0, m, n) == int(even)
        assert rank_keeping(0.5, m, n) * (m + n) <= 0.5 * m * n < (rank_keeping(0.5, m, n) + 1) * (m + n)
    with pytest.raises(ValueError, match="rank 0"):
        rank_keeping(0.01, 8, 8)
    with pytest.raises(ValueError, match="rank=10"):
        factors(matrix(), 10)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=12), st.data())
def test_ranks_hit_the_budget_within_their_clamps(importance, data):
    lowest = data.draw(st.integers(1, 8))
    mean = data.draw(st.integers(lowest, 40))
    highest = data.draw(st.integers(mean, 64))
    ranks = allocate_ranks(importance, mean, lowest, highest)
    assert sum(ranks) == mean * len(importance)
    assert all(lowest <= rank <= highest for rank in ranks)
    order = sorted(range(len(ranks)), key=lambda j: importance[j])
    assert all(ranks[a] <= ranks[b] + 1 for a, b in zip(order, order[1:], strict=False))


def test_ranks_go_with_importance():
    assert allocate_ranks([1, 2, 3], 10, 1, 20) == [5, 10, 15]
    assert allocate_ranks([0, 0, 0], 10, 1, 20) == [10, 10, 10]
    assert allocate_ranks([0, 0, 9], 10, 4, 12) == [9, 9, 12]
    with pytest.raises(ValueError, match="mean=3"):
        allocate_ranks([1, 1], 3, 4, 8)

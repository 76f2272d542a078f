"""What routers sort: as a stable sort does it, on every variant of the kernels."""

import subprocess
import sys

import pytest
import torch

from moestro.ops import backend, native
from moestro.ops.order import MOST_KEPT, by_expert, largest
from moestro.routers import TopK

needs_kernels = pytest.mark.skipif(native.library().handle is None, reason=f"native kernels {native.status()}")
INF, NAN = float("inf"), float("nan")


def drawn(rows, columns):
    """Numbers of which many are equal."""
    generator = torch.Generator().manual_seed(rows + columns)
    return torch.randint(-9, 9, (rows, columns), generator=generator).float() / 4


@needs_kernels
@pytest.mark.parametrize("variant", native.variants())
@pytest.mark.parametrize(
    ("rows", "columns", "k"), [(1, 1, 1), (7, 5, 5), (40, 33, 4), (9, 300, MOST_KEPT), (0, 8, 2), (6, 3, 9)]
)
def test_the_largest_are_those_of_a_stable_sort(rows, columns, k, variant, counted):
    values = drawn(rows, columns)
    want = values.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    with backend.force("native"), native.variant(variant):
        have = largest(values, k)
        turned = largest(values.T.contiguous().T.requires_grad_(), k)
    assert counted == ["largest_of_rows"] * 2 and torch.equal(have, want) and torch.equal(turned, want)
    assert have.is_contiguous()


@needs_kernels
@pytest.mark.parametrize("k", [1, 3, 6])
def test_infinite_numbers_zeros_of_both_signs_and_what_is_no_number_come_as_in_a_sort(k, counted):
    rows = [
        [0.0, -0.0, -INF, 0.0, -0.0, -INF],
        [1.0, NAN, INF, -NAN, -INF, INF],
        [-INF] * 6,
        [NAN] * 6,
        [-INF, -INF, 2.0, -INF, NAN, 2.0],
    ]
    values = torch.tensor(rows)
    have = largest(values, k)
    assert counted == ["largest_of_rows"]
    assert torch.equal(have, values.sort(dim=-1, descending=True, stable=True).indices[:, :k])


def test_what_has_no_kernel_is_sorted(counted):
    values = drawn(5, 50)
    for name, numbers, k in (("fused", values, 3), ("native", values.double(), 3), ("native", values, MOST_KEPT + 1)):
        if name == "native" and native.library().handle is None:
            continue
        with backend.force(name):
            want = numbers.sort(dim=-1, descending=True, stable=True).indices[:, :k]
            assert torch.equal(largest(numbers, k), want)
    assert largest(values, 0).shape == (5, 0) and not counted


@needs_kernels
@pytest.mark.parametrize("variant", native.variants())
@pytest.mark.parametrize(("n", "experts"), [(0, 3), (1, 1), (1000, 7), (20, 400), (0, 0)])
def test_rows_by_expert_are_those_of_a_stable_sort(n, experts, variant, counted):
    expert = torch.randint(max(1, experts), (n,), generator=torch.Generator().manual_seed(n)) // 2 * 2
    with backend.force("fused"):
        want = by_expert(expert, experts)
    assert not counted
    with backend.force("native"), native.variant(variant):
        have = by_expert(expert, experts)
    assert counted == ["order_by_expert"]
    assert all(torch.equal(a, b) for a, b in zip(have, want, strict=True))
    assert torch.equal(expert[have[0]], expert.sort(stable=True).values)


@needs_kernels
@pytest.mark.parametrize("expert", [[0, 3, 1], [-1, 0], [2**40]])
def test_experts_that_there_are_not_are_refused(expert):
    with pytest.raises(ValueError, match=r"experts -?\d+ to \d+, allowed: 0 to 2"):
        by_expert(torch.tensor(expert), 3)


@needs_kernels
def test_threads_change_nothing(two_threads):
    values = drawn(501, 40)
    two = largest(values, 8)
    torch.set_num_threads(1)
    assert torch.equal(largest(values, 8), two)


@needs_kernels
def test_routers_take_kernels(counted):
    TopK(3)(drawn(30, 12)).grouped()
    assert counted == ["largest_of_rows", "order_by_expert"]


def test_compiled_graphs_sort_in_one_piece():
    code = (
        "import torch; from moestro.routers import TopK; top, z = TopK(3), torch.randn(30, 12).round(); "
        "f = lambda z: top(z).grouped(); c = torch.compile(lambda z: f(z).weight, fullgraph=True, backend='eager'); "
        "assert torch.equal(c(z), f(z).weight)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

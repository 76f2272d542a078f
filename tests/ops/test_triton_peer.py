"""PEER's Triton kernels against the definitions in float64: outputs and every gradient.

Without a GPU the kernels run under Triton's interpreter; new memory is NaN (see conftest).
"""

import pytest
import torch

from moestro import ops
from moestro.ops import backend
from moestro.ops.row_gradients import coalesced_rows, collect_factors, pending_factors, row_gradient
from tests.ops.triton_cases import DEVICE, why_not
from tests.tolerances import FLOAT16_NORM, FLOAT32_NORM

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())
TOLERANCE = {torch.float32: FLOAT32_NORM, torch.float16: FLOAT16_NORM}
# tokens, rows of each, experts, width
CASES = {
    "one row": (1, 1, 1, 4),
    "odd sizes": (7, 5, 49, 13),
    "experts that many tokens meet": (20, 6, 3, 20),
    "more rows than a program holds": (5, 11, 60, 17),
    "no tokens": (0, 4, 9, 8),
    "no rows": (3, 0, 9, 8),
}
# the interpreter takes seconds for each of these
LONG = ("experts that many tokens meet", "more rows than a program holds")
EVERY_CASE = [pytest.param(case, marks=pytest.mark.slow if case in LONG else (), id=case) for case in CASES]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def arguments(t: int, k: int, n: int, d: int, gated: bool, dtype: torch.dtype):
    """x, ids, weight and the tables."""
    ids = torch.randint(n, (t, k), generator=torch.Generator().manual_seed(k))
    x, weight = drawn(t, d), drawn(t, k, seed=1)
    tables = [drawn(n, d, seed=2 + i) * (1.0 if i == 2 else d**-0.5) for i in range(3 if gated else 2)]
    floats = [v.to(DEVICE, dtype) for v in (x, weight, *tables)]
    return floats[0], ids.to(DEVICE), floats[1], floats[2:]


def neurons(name: str, call, activation: str, sparse: bool = False, dtype: torch.dtype | None = None):
    """y and the gradients of x, weight and every table, rows as dense tensors."""
    x, ids, weight, tables = call
    leaves = [v.detach().to(dtype or v.dtype).clone().requires_grad_() for v in (x, weight, *tables)]
    with backend.force(name):
        y = ops.singleton_experts(leaves[0], ids, leaves[1], leaves[2], leaves[3], activation, sparse, *leaves[4:])
    (y * slopes(y)).sum().backward()
    return y.detach(), *(leaf.grad.to_dense() for leaf in leaves)


def slopes(y: torch.Tensor) -> torch.Tensor:
    return torch.linspace(-1.5, 1.5, y.numel(), dtype=torch.float64, device=y.device).to(y.dtype).view_as(y)


def assert_near(have, want, tolerance: float) -> None:
    for number, (part, exact) in enumerate(zip(have, want, strict=True)):
        assert part.shape == exact.shape, number
        error, size = (part.double() - exact).norm(), exact.norm()
        assert error <= tolerance * size, f"{number}: error {error:.2e} of {size:.2e}"


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("case", EVERY_CASE)
def test_neurons_equal_the_definition(case, gated, sparse):
    call = arguments(*CASES[case], gated, torch.float32)
    have = neurons("triton", call, "gelu", sparse)
    assert_near(have, neurons("reference", call, "gelu", dtype=torch.float64), FLOAT32_NORM)


@pytest.mark.parametrize("gated", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu", "none"])
def test_every_activation(activation, gated):
    call = arguments(3, 5, 9, 13, gated, torch.float32)
    have = neurons("triton", call, activation)
    assert_near(have, neurons("reference", call, activation, dtype=torch.float64), FLOAT32_NORM)


@pytest.mark.parametrize("gated", [False, True])
def test_float16(gated):
    call = arguments(*CASES["odd sizes"], gated, torch.float16)
    have = neurons("triton", call, "silu", sparse=True)
    assert all(part.dtype == torch.float16 for part in have)
    assert_near(have, neurons("reference", call, "silu", dtype=torch.float64), FLOAT16_NORM)


def test_rows_that_nobody_meets_have_no_gradient_and_are_absent_where_gradients_are_sparse():
    x, _, weight, tables = arguments(2, 2, 6, 4, False, torch.float32)
    call = x, torch.tensor([[3, 3], [3, 1]], device=DEVICE), weight, tables
    have = neurons("triton", call, "gelu")
    assert_near(have, neurons("reference", call, "gelu", dtype=torch.float64), FLOAT32_NORM)
    assert all(not table[[0, 2, 4, 5]].any() and table[[1, 3]].any() for table in have[3:])
    leaves = [table.clone().requires_grad_() for table in tables]
    with backend.force("triton"):
        ops.singleton_experts(x, call[1], weight, *leaves, "gelu", True).sum().backward()
    assert all(coalesced_rows(leaf)[0].tolist() == [1, 3] for leaf in leaves)
    assert all(len(leaf.grad._values()) == 2 for leaf in leaves)


@pytest.mark.parametrize("places", [4, 7, 256])
def test_a_row_of_many_places_is_summed_in_parts(places, monkeypatch):
    from moestro.ops import triton_peer_rows

    monkeypatch.setattr(triton_peer_rows, "_PART", places)
    # two rows of many places among rows of few, one of as many as a part
    call = arguments(12, 4, 5, 9, False, torch.float32)
    call[1][:6], call[1][6:8], call[1][8:9] = 2, 4, 0
    have = neurons("triton", call, "relu", sparse=True)
    assert_near(have, neurons("reference", call, "relu", dtype=torch.float64), FLOAT32_NORM)


def test_runs_agree_to_the_bit():
    call = arguments(10, 6, 4, 20, True, torch.float32)
    first, again = (neurons("triton", call, "silu", sparse=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_tensors_need_not_be_contiguous():
    x, ids, weight, tables = arguments(3, 5, 9, 13, False, torch.float32)
    want = neurons("triton", (x, ids, weight, tables), "gelu")
    apart = [torch.stack([v, v], dim=-1)[..., 0] for v in (x, weight, *tables)]
    have = neurons("triton", (apart[0], ids.repeat(1, 2)[:, : ids.shape[1]], apart[1], apart[2:]), "gelu")
    assert all(torch.equal(a, b) for a, b in zip(have, want, strict=True))


def test_factors_of_tables_are_collected_in_place_of_gradients():
    x, ids, weight, tables = arguments(*CASES["odd sizes"], False, torch.float32)
    want = neurons("reference", (x, ids, weight, tables), "gelu", dtype=torch.float64)
    leaves = [table.clone().requires_grad_() for table in tables]
    collect_factors(leaves)
    with backend.force("triton"):
        y = ops.singleton_experts(x, ids, weight, *leaves, "gelu", True)
    (y * slopes(y)).sum().backward()
    assert all(leaf.grad is None and len(pending_factors(leaf)) == 1 for leaf in leaves)
    for leaf, exact in zip(leaves, want[3:], strict=True):
        rows = row_gradient(leaf)
        assert_near([rows.values(0, len(rows.ids))], [exact[rows.ids]], FLOAT32_NORM)


def test_only_the_gradients_that_are_asked_for():
    x, ids, weight, tables = arguments(*CASES["odd sizes"], False, torch.float32)
    x.requires_grad_()
    with backend.force("triton"):
        ops.singleton_experts(x, ids, weight, *tables, "gelu").sum().backward()
    assert x.grad is not None and all(table.grad is None for table in (weight, *tables))


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("case", EVERY_CASE)
def test_values_equal_the_definition(case, sparse):
    _, ids, weight, (values, _) = arguments(*CASES[case], False, torch.float32)

    def run(name, dtype):
        leaves = [v.detach().to(dtype).requires_grad_() for v in (weight, values)]
        with backend.force(name):
            y = ops.value_rows(ids, *leaves, sparse)
        (y * slopes(y)).sum().backward()
        return y.detach(), *(leaf.grad.to_dense() for leaf in leaves)

    assert_near(run("triton", torch.float32), run("reference", torch.float64), FLOAT32_NORM)


def retrieved(name: str, query, keys, k: int, dtype: torch.dtype):
    leaves = [v.detach().to(dtype).requires_grad_() for v in (query, keys)]
    with backend.force(name):
        scores, ids = ops.product_key_topk(*leaves, k)
    (scores * slopes(scores)).sum().backward()
    return ids, (scores.detach(), *(leaf.grad for leaf in leaves))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    ("tokens", "heads", "side", "k", "half"),
    [
        (5, 1, 4, 4, 2),
        (9, 2, 8, 3, 5),
        (6, 1, 50, 1, 8),
        (0, 2, 6, 2, 4),
        pytest.param(3, 2, 31, 5, 24, marks=pytest.mark.slow),
        pytest.param(5, 3, 37, 16, 1, marks=pytest.mark.slow),
    ],
)
def test_retrieval_equals_the_definition(shared, tokens, heads, side, k, half):
    query, keys = drawn(tokens, heads, 2 * half), drawn(2, 1 if shared else heads, side, half)
    query, keys = query.to(DEVICE), keys.to(DEVICE)
    have_ids, have = retrieved("triton", query, keys, k, torch.float32)
    want_ids, want = retrieved("reference", query, keys, k, torch.float64)
    assert torch.equal(have_ids, want_ids) and have_ids.dtype == torch.int64
    assert_near(have, want, FLOAT32_NORM)


def test_equal_scores_are_in_the_order_of_the_definition():
    keys = torch.ones(2, 1, 9, 4, device=DEVICE)
    keys[0, 0, 5], keys[1, 0, 3] = 2.0, 0.5
    query = torch.tensor([[[1.0] * 8], [[-1.0] * 8], [[0.0] * 8]], device=DEVICE)
    want_ids, (want, *_) = retrieved("reference", query, keys, 6, torch.float32)
    have_ids, (have, *_) = retrieved("triton", query, keys, 6, torch.float32)
    assert torch.equal(have_ids, want_ids) and torch.equal(have, want)


def test_dtypes_that_the_kernels_do_not_read_are_refused():
    x, ids, weight, tables = arguments(*CASES["one row"], False, torch.float64)
    with backend.force("triton"), pytest.raises(ValueError, match="float64"):
        ops.product_key_topk(torch.zeros(1, 1, 4, dtype=torch.float64), torch.zeros(2, 1, 2, 2, dtype=torch.float64), 1)
    with backend.force("triton"), pytest.raises(ValueError, match="float64"):
        ops.singleton_experts(x, ids, weight, *tables, "gelu")


def test_nothing_of_gathered_rows_is_kept_for_backward():
    x, ids, weight, tables = arguments(8, 16, 64, 32, True, torch.float32)
    inputs = [v.requires_grad_() for v in (x, weight, *tables)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: kept.append(v) or v, lambda v: v), backend.force("triton"):
        ops.singleton_experts(inputs[0], ids, inputs[1], *inputs[2:4], "silu", False, inputs[4])
    held = {v.data_ptr() for v in (*inputs, ids)}
    assert sum(v.numel() for v in kept if v.data_ptr() not in held) == 2 * ids.numel()

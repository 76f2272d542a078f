"""Gated experts on few rows on compiled kernels: against the definition in float64, on every variant."""

from typing import Any, cast

import pytest
import torch

from moestro import ops
from moestro.ops import backend, native
from moestro.ops.ffn import MOST_ROWS, ROWS_PER_EXPERT
from moestro.ops.native.few_rows import few_rows
from tests.ops.test_expert_ffn import inputs
from tests.ops.test_few_rows import CASES, defined, problem
from tests.tolerances import BFLOAT16_NORM, FLOAT32_NORM

Sorted = tuple[Any, Any, Any, Any, Any, Any, Any]
pytestmark = pytest.mark.skipif(native.library().handle is None, reason=f"native kernels {native.status()}")
DTYPES = {torch.float32: FLOAT32_NORM, torch.bfloat16: BFLOAT16_NORM}
# tokens, rows of every expert, widths; counts of rows that fill groups of four, of two, and neither
ROWS = {
    "one token": (1, [1, 0, 1], [40, 33, 17]),
    "groups of rows": (9, [7, 0, 1, 4, 3], [5, 9, 0, 37, 64]),
    "no rows": (3, [0, 0], [4, 6]),
    "only width 0": (2, [1, 1], [0, 0]),
}
# of experts that may be stacked
EQUAL = {
    "one token, stacked": (1, [1, 0, 1], [33, 33, 33]),
    "groups of rows, stacked": (9, [7, 0, 1, 4, 3], [37, 37, 37, 37, 37]),
    "no rows, stacked": (3, [0, 0], [4, 4]),
    "width 0, stacked": (2, [1, 1], [0, 0]),
}


def sorted_rows(case: str, dtype: torch.dtype, d: int = 0) -> Sorted:
    values: Any = inputs(*(ROWS | EQUAL)[case], 2, dtype)
    plain: Any = tuple(v.detach() if isinstance(v, torch.Tensor) else v for v in values)
    x, token, weight, offsets, w_in, w_out, widths = plain
    if d:
        x, w_in, w_out = (v.repeat(1, -(-d // v.shape[1]))[:, :d].contiguous() for v in (x, w_in, w_out))
    return x, token, weight, offsets, w_in, w_out, widths


def stacked(arguments: Sorted) -> Sorted:
    """The same with one matrix out for each expert."""
    x, token, weight, offsets, w_in, w_out, widths = arguments
    return x, token, weight, offsets, w_in, w_out.view(len(widths), widths[0], x.shape[1]).mT.contiguous(), widths


def definition(arguments: Sorted):
    wide: Any = tuple(v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in arguments)
    with backend.force("reference"):
        x, token, weight, offsets, w_in, w_out, widths = wide
        return ops.expert_ffn(x, token, weight, offsets, w_in, w_out, widths, "silu")


@pytest.mark.parametrize("variant", native.variants())
@pytest.mark.parametrize("d", [1, 31, 64, 77])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("case", ROWS | EQUAL)
def test_sorted_rows_equal_the_definition(case, dtype, d, variant, counted):
    arguments = sorted_rows(case, dtype, d)
    kernels = ["few_rows", "few_rows_columns"] if case in EQUAL else ["few_rows"]
    with backend.force("native"), native.variant(variant):
        have = ops.expert_ffn(*(stacked(arguments) if case in EQUAL else arguments), "silu")
    want = definition(arguments)
    assert counted[: len(kernels)] == kernels and have.dtype == dtype
    assert (have.double() - want).norm() <= DTYPES[dtype] * want.norm()


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("case", [name for name, (_, _, n_tokens, _) in CASES.items() if n_tokens == 1])
def test_the_rows_of_a_token_in_any_order(case, dtype, counted):
    p = cast(Sorted, problem(case, 2, dtype))
    with backend.force("native"):
        have = ops.few_rows_ffn(*p, "silu")
    want = defined(*p, "silu")
    assert counted[:1] == ["few_rows"] and (have.double() - want).norm() <= DTYPES[dtype] * want.norm()


def test_weights_are_read_as_they_lie_under_autocast():
    arguments = sorted_rows("groups of rows", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        have = ops.expert_ffn(*arguments, "silu")
    want = definition(arguments)
    assert have.dtype == torch.bfloat16 and (have.double() - want).norm() <= BFLOAT16_NORM * want.norm()


@pytest.mark.parametrize("case", ["groups of rows", "groups of rows, stacked"])
def test_threads_and_other_rows_change_no_bit(case, two_threads):
    plain = sorted_rows(case, torch.float32, 100)
    arguments = stacked(plain) if case in EQUAL else plain
    several = ops.expert_ffn(*arguments, "silu")
    torch.set_num_threads(1)
    assert torch.equal(ops.expert_ffn(*arguments, "silu"), several)


def test_weights_of_experts_without_rows_are_not_read():
    x, token, weight, offsets, w_in, w_out, widths = sorted_rows("groups of rows", torch.float32)
    want = ops.expert_ffn(x, token, weight, offsets, w_in, w_out, widths, "silu")
    w_in[10:28], w_out[5:14] = float("nan"), float("nan")
    assert torch.equal(ops.expert_ffn(x, token, weight, offsets, w_in, w_out, widths, "silu"), want)


@pytest.mark.parametrize(
    "why", ["a gradient", "many rows", "another activation", "no gate", "float64", "another backend"]
)
def test_everything_else_runs_without_these_kernels(why, counted):
    x, token, weight, offsets, w_in, w_out, widths = sorted_rows("groups of rows", torch.float32)
    activation, name = "silu", "fused" if why == "another backend" else "native"
    if why == "a gradient":
        w_out.requires_grad_()
    elif why == "many rows":
        n = min(MOST_ROWS, ROWS_PER_EXPERT * len(widths)) + 1
        token, weight, offsets = torch.zeros(n, dtype=torch.long), torch.ones(n), torch.tensor([0, n, n, n, n, n])
    elif why == "another activation":
        activation = "gelu"
    elif why == "no gate":
        w_in = w_in[: len(w_out)]
    elif why == "float64":
        x, weight, w_in, w_out = (v.double() for v in (x, weight, w_in, w_out))
    with backend.force(name):
        assert ops.expert_ffn(x, token, weight, offsets, w_in, w_out, widths, activation).isfinite().all()
    assert "few_rows" not in counted


def test_what_does_not_go_together_is_refused(unchecked_shapes):
    x, token, weight, offsets, w_in, w_out, widths = sorted_rows("groups of rows", torch.float32)
    bounds = offsets.tolist()
    with pytest.raises(ValueError, match=r"w_in \[230, 12\], w_out \[114, 12\], allowed: those of 115 units"):
        few_rows(x, token, weight, bounds, w_in, w_out[1:], widths)
    with pytest.raises(ValueError, match=r"w_out \[5, 12, 64\], allowed: those of 115 units"):
        few_rows(x, token, weight, bounds, w_in, w_out.new_empty(5, 12, 64), widths)
    with pytest.raises(ValueError, match="15 tokens, 14 weights, allowed: 15 of 9 tokens"):
        few_rows(x, token, weight[1:], bounds, w_in, w_out, widths)
    with pytest.raises(ValueError, match="15 tokens, 15 weights, allowed: 15 of 9 tokens"):
        few_rows(x, token.clamp(min=9), weight, bounds, w_in, w_out, widths)

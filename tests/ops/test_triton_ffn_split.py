"""Weight gradients of an expert with most of the rows, summed in parts: against the definition, expert by expert."""

import pytest
import torch

from moestro.ops import backend
from moestro.ops.backend import TritonOptions
from tests.ops.test_triton_ffn import some
from tests.ops.triton_cases import assert_close, outputs_and_gradients, parts, problem, why_not
from tests.tolerances import FLOAT16_NORM, FLOAT32_NORM

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())
SPLIT = TritonOptions(split=True)
# tokens each expert serves, number of tokens, widths; more than 4 times the mean, rounded up, are split
CASES = {
    "two parts of two tiles each": ([some(38, 9), [], [3], [], [], [], [], []], 9, [19, 4, 3, 5, 0, 1, 2, 1]),
    "all rows to one, in parts of 8, 8 and 1": ([[]] * 15 + [some(17, 9)], 9, [1] * 15 + [37]),
    "to one of width 0": ([some(20, 9), [1, 2], [3, 4], *([[]] * 5)], 9, [0, 4, 5, 6, 7, 8, 9, 10]),
    "two of many": ([some(8, 9), some(7, 9), *([[]] * 14)], 9, [17, 20, *([1] * 14)]),
}


@pytest.mark.parametrize(("case", "gates"), [*((case, 2) for case in CASES), ("two of many", 1)])
def test_equals_the_definition(case, gates):
    p = problem(*CASES[case], gates, torch.float32, d=9)
    have = outputs_and_gradients("triton", p, "silu", options=SPLIT)
    assert_close(have, outputs_and_gradients("reference", p, "silu", torch.float64), p, FLOAT32_NORM)


def test_float16():
    p = problem(*CASES["all rows to one, in parts of 8, 8 and 1"], 2, torch.float16, d=9)
    have = outputs_and_gradients("triton", p, "silu", options=SPLIT)
    assert_close(have, outputs_and_gradients("reference", p, "silu", torch.float64), p, FLOAT16_NORM)


def test_only_busy_experts_are_summed_otherwise_and_always_alike():
    p = problem(*CASES["two of many"], 2, torch.float32, d=9)
    whole = parts(outputs_and_gradients("triton", p, "silu"), p)
    first, second = (parts(outputs_and_gradients("triton", p, "silu", options=SPLIT), p) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    split = {key for key in whole if not torch.equal(first[key], whole[key])}
    assert split == {f"{name} of expert {e}" for name in ("dw_in", "dw_out") for e in (0, 1)}


def test_parts_fit_into_the_room_for_them():
    from moestro.ops.triton_ffn_backward import part_units

    for rows in ([79, 1], [41, 41, 41], [96], [40, 40], [200, 5]):
        n, split = sum(rows), backend.SPLIT_FROM * 10
        needed = sum(-(-r // split) for r in rows if r > split)
        assert needed * 7 <= part_units(n, 7, split)
    assert part_units(100, 7, 0) == 0

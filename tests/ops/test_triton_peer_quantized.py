"""Tables in 8 bits in Triton: experts as the numbers that rows stand for, and AdamW by the codes of plain torch."""

import pytest
import torch

from moestro.ops import backend
from moestro.ops.quantized import CODES, QuantizedTable, quantize_rows, quantized_singletons
from moestro.ops.row_gradients import FactoredRows
from tests.ops.test_triton_peer import CASES, LONG, arguments, assert_near, slopes
from tests.ops.triton_cases import DEVICE, why_not
from tests.tolerances import FLOAT16_NORM, FLOAT32_NORM
from tests.train.test_rows_in_8_bits import require_same_codes, steps_taken

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())
each_storage = pytest.mark.parametrize("storage", list(CODES))
EVERY_CASE = [case for case in CASES if case not in LONG]


def run(name: str, call, storage: str, activation: str, dtype=torch.float32):
    """y, the gradients of x and weight, and those that are left beside the tables, in the order (up, down, gate)."""
    x, ids, weight, wide = call
    tables = [quantize_rows(table, storage) for table in wide]
    tables = [QuantizedTable(table.codes, table.scale.to(dtype), []) for table in tables]
    leaves = [v.detach().to(dtype).clone().requires_grad_() for v in (x, weight)]
    with backend.force(name):
        y = quantized_singletons(leaves[0], ids, leaves[1], tables[0], tables[1], activation, *tables[2:])
        (y * slopes(y)).sum().backward()
    return [y.detach(), *(leaf.grad for leaf in leaves), *(dense(table) for table in tables)]


def dense(table: QuantizedTable) -> torch.Tensor:
    """A table's gradient."""
    (found,) = table.pending or ()
    assert isinstance(found, FactoredRows)
    all_rows = torch.zeros(table.codes.shape, dtype=torch.float64, device=DEVICE)
    with backend.force("fused"):
        return all_rows.index_copy(0, found.ids, found.values(0, len(found.ids)).double())


@each_storage
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("case", EVERY_CASE)
def test_experts_and_every_gradient_equal_the_definition(case, gated, storage):
    call = arguments(*CASES[case], gated, torch.float32)
    have = run("triton", call, storage, "gelu")
    assert all(part.dtype == torch.float32 for part in have[:3])
    assert_near(have, run("fused", call, storage, "gelu", torch.float64), FLOAT32_NORM)


@each_storage
def test_every_code_is_the_number_it_stands_for(storage):
    every = torch.arange(256, dtype=torch.uint8).view(CODES[storage][0]).view(16, 16).to(DEVICE)
    table = QuantizedTable(every, torch.full((16,), 0.5, device=DEVICE))
    ones = QuantizedTable(torch.ones(16, 16, device=DEVICE).to(every.dtype), torch.ones(16, device=DEVICE))
    ids, weight = torch.arange(16, device=DEVICE)[:, None], torch.ones(16, 1, device=DEVICE)
    with torch.no_grad(), backend.force("triton"):
        y = quantized_singletons(torch.ones(16, 16, device=DEVICE) / 16, ids, weight, ones, table, "none")
    torch.testing.assert_close(y, 0.5 * every.float(), rtol=0, atol=0, equal_nan=True)


@each_storage
def test_a_broken_row_is_that_of_those_who_meet_it(storage):
    """Row 0, which places that are not there would be."""
    up, down = (quantize_rows(torch.ones(9, 13, device=DEVICE), storage) for _ in range(2))
    up.scale[0] = down.scale[0] = float("nan")
    ids = torch.tensor([[1, 2, 3, 4, 5], [0, 2, 3, 4, 5]], device=DEVICE)
    x = torch.ones(2, 13, device=DEVICE, requires_grad=True)
    with backend.force("triton"):
        y = quantized_singletons(x, ids, torch.ones(2, 5, device=DEVICE), up, down, "gelu")
        y.sum().backward()
    for found in (y, x.grad):
        assert found[0].isfinite().all() and found[1].isnan().all()


@each_storage
@pytest.mark.parametrize("d", [1, 24, 50])
def test_a_step_changes_the_same_codes_and_scales_as_plain_torch(d, storage):
    require_same_codes(steps_taken("triton", d, storage, DEVICE), steps_taken("fused", d, storage, DEVICE))


def test_without_gradients_the_kernel_widens_what_comes_in():
    x, ids, weight, tables = arguments(4, 3, 25, 8, False, torch.float16)
    up, down = (quantize_rows(table, "int8") for table in tables)
    with torch.no_grad(), backend.force("triton"):
        have = quantized_singletons(x, ids, weight, up, down, "gelu")
    with torch.no_grad(), backend.force("fused"):
        want = quantized_singletons(x, ids, weight, up, down, "gelu")
    assert have.dtype == want.dtype == torch.float16
    assert_near([have], [want.double()], FLOAT16_NORM)


def test_what_the_kernels_do_not_take_is_refused():
    x, ids, weight, tables = arguments(2, 3, 9, 4, False, torch.float64)
    up, down = (quantize_rows(table, "int8") for table in tables)
    with backend.force("triton"), pytest.raises(ValueError, match="float64"):
        quantized_singletons(x, ids, weight, up, down, "gelu")

"""AdamW on rows in one compiled pass: as the plain operations, from values or factors, on any number of threads."""

from dataclasses import replace

import pytest
import torch

from moestro.ops import backend, native
from moestro.ops.native import row_adamw
from moestro.ops.row_adamw import RowConstants, RowFactors, adamw_rows
from moestro.ops.row_gradients import FactoredRows, RowValues
from tests.ops.test_native import VARIANTS, built
from tests.tolerances import FLOAT32_LAST_BITS

N, CONSTANTS = 50, RowConstants((0.9, 0.95), 1e-8, key=12345)
IDS = torch.tensor([0, 3, 4, 17, 31, 49])
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def factored(d: int) -> FactoredRows:
    """A gradient of rows `IDS` from 9 tokens, with 1 to 6 pairs a row."""
    counts = torch.tensor([1, 6, 2, 1, 3, 4])
    order = torch.randperm(17, generator=torch.Generator().manual_seed(0))
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    return FactoredRows(IDS, starts, order, draw(9, d, seed=5), torch.arange(17) % 9, draw(17, seed=6))


def factors(skipped: str) -> RowFactors:
    decay, size, correction, mean, square = (0.1 + 0.9 * draw(6, seed=i).abs().clamp(max=1) for i in range(5))
    return RowFactors(decay, -size, correction, *((mean, square) if skipped == "decay" else ()))


def updated(name: str, gradient, d: int, dtype=torch.float32, skipped="keep"):
    """A table and its moments after one step on one backend."""
    table, mean, square = draw(N, d).to(dtype), draw(N, d, seed=1).to(dtype), draw(N, d, seed=2).square()
    with backend.force(name):
        adamw_rows(table, (mean, square), gradient, factors(skipped), CONSTANTS)
    return table, mean, square


@built
@every_variant
@pytest.mark.parametrize("skipped", ["keep", "decay"])
@pytest.mark.parametrize("d", [1, 7, 133, 2500])
def test_one_pass_is_the_plain_operations(variant, skipped, d):
    values = RowValues(IDS, factored(d).values(0, len(IDS)))
    before = draw(N, d)
    with native.variant(variant):
        for gradient in (values, factored(d)):
            have = updated("native", gradient, d, skipped=skipped)
            for mine, want in zip(have, updated("fused", gradient, d, skipped=skipped), strict=True):
                torch.testing.assert_close(mine, want, **FLOAT32_LAST_BITS)
            rest = [row for row in range(N) if row not in IDS]
            assert torch.equal(have[0][rest], before[rest]) and not torch.equal(have[0], before)


@built
@every_variant
def test_what_is_kept_in_bfloat16_is_rounded_by_the_same_bits(variant):
    """Where float32 differs in its last bit, the neighbour may be the other one; with other bits, half of them were."""
    with native.variant(variant):
        have = updated("native", factored(700), 700, torch.bfloat16)
    want = updated("fused", factored(700), 700, torch.bfloat16)
    for mine, other in zip(have[:2], want[:2], strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine[IDS] != other[IDS]).float().mean() < 0.01
        torch.testing.assert_close(mine, other, rtol=2**-7, atol=0)
    torch.testing.assert_close(have[2], want[2], **FLOAT32_LAST_BITS)


@built
@every_variant
def test_what_is_not_a_number_stays_so_in_bfloat16(variant):
    """With all bits set, too, to which nothing can be added; and the greatest numbers become infinite, not negative."""
    values = torch.full((6, 40), -1, dtype=torch.int32).view(torch.float32)
    values[3:] = torch.finfo(torch.float32).max
    table, one = torch.ones(N, 40).bfloat16(), torch.ones(6)
    mean, square = torch.zeros_like(table), torch.zeros(N, 40)
    with backend.force("native"), native.variant(variant):
        everything = RowConstants((0.0, 0.95), 1e-8, key=1)
        adamw_rows(table, (mean, square), RowValues(IDS, values), RowFactors(one, -one, one), everything)
    assert table[IDS[:3]].isnan().all() and mean[IDS[:3]].isnan().all()
    assert (mean[IDS[3:]] > 3e38).all() and mean[IDS[3:]].isposinf().any()


@built
@every_variant
def test_roots_and_quotients_are_rounded_as_the_processor_rounds_them(variant):
    """float64 rounded to float32 is the rounding of the exact root, and of the exact quotient."""
    patterns = torch.randint(0, 0x7F800001, (6, 4000), generator=torch.Generator().manual_seed(1))
    square = patterns.to(torch.int32).view(torch.float32)
    square[0, :3] = torch.tensor([0.0, torch.inf, torch.nan])
    table, moments = torch.zeros(N, 4000), [torch.zeros(N, 4000), torch.zeros(N, 4000)]
    moments[1][IDS] = square
    one, correction = torch.ones(6), torch.tensor([1.0, 0.9999999, 0.5000001, 0.2236068, 0.0316227, 0.7071068])
    gradient = RowValues(IDS, torch.full((6, 4000), 1e-30))
    with backend.force("native"), native.variant(variant):
        adamw_rows(
            table, (moments[0], moments[1]), gradient, RowFactors(one, one, correction), replace(CONSTANTS, eps=0.0)
        )
    root = (square * torch.tensor(0.95)).double().sqrt().float()
    denominator = (root.double() / correction.double()[:, None]).float()
    want = (moments[0][IDS].double() / denominator.double()).float()
    torch.testing.assert_close(table[IDS], want, rtol=0, atol=0, equal_nan=True)


@built
@pytest.mark.usefixtures("two_threads")
def test_threads_change_no_bit():
    many = updated("native", factored(64), 64, torch.bfloat16)
    torch.set_num_threads(1)
    one = updated("native", factored(64), 64, torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(many, one, strict=True))


@built
def test_no_rows_are_no_work_and_wrong_rows_are_refused():
    nothing = RowValues(IDS[:0], torch.zeros(0, 4))
    table = draw(N, 4)
    empty = RowFactors(*(torch.zeros(0),) * 3)
    with backend.force("native"):
        adamw_rows(table, (table.clone(), table.clone()), nothing, empty, CONSTANTS)
        assert torch.equal(table, draw(N, 4))
        for ids in ([0, N], [-1, 3], [3, 3], [4, 2]):
            with pytest.raises(ValueError, match="row ids must ascend within 0 to 49, each once"):
                row_adamw.adamw_rows(table, (table, table), torch.tensor(ids), (), (), ())


@built
def test_float64_and_mixed_tables_take_the_plain_way(monkeypatch):
    monkeypatch.setattr(native, "run", None)
    gradient = RowValues(IDS, draw(6, 4))
    for dtype in (torch.float64, torch.float32):
        table = draw(N, 4).to(dtype)
        mean = torch.zeros(N, 4, dtype=torch.float64 if dtype == torch.float64 else torch.bfloat16)
        adamw_rows(table, (mean, torch.zeros_like(table)), gradient, factors("keep"), CONSTANTS)
        assert not torch.equal(table, draw(N, 4).to(dtype))

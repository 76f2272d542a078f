"""AdamW on rows in one compiled pass: as the plain operations, from values or factors, on any number of threads."""

import math
from dataclasses import replace

import pytest
import torch

from moestro.ops import backend, native
from moestro.ops.native import row_adamw
from moestro.ops.row_adamw import RowState, RowStep, adamw_rows
from moestro.ops.row_gradients import FactoredRows, RowValues
from tests.ops.test_native import VARIANTS, built
from tests.tolerances import FLOAT32_LAST_BITS

N = 50
STEP = RowStep(8, 0.01, 0.1, (0.9, 0.95), 1e-8, log_decay=-0.003, moments_wait=True, key=12345)
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


def fresh(d: int, dtype=torch.float32) -> tuple[torch.Tensor, RowState]:
    """A table and its state after some steps: rows that were met in different ones, and one in none."""
    moments = draw(N, d, seed=1).to(dtype), draw(N, d, seed=2).square()
    clock = torch.arange(N, dtype=torch.int32) % 7
    return draw(N, d).to(dtype), RowState(*moments, clock, -0.001 * (clock % 3).double())


def updated(name: str, gradient, d: int, dtype=torch.float32, step=STEP):
    """A table and its state after one step on one backend."""
    table, state = fresh(d, dtype)
    with backend.force(name):
        adamw_rows(table, state, gradient, step)
    return table, *state


@built
@every_variant
@pytest.mark.parametrize("moments_wait", [True, False])
@pytest.mark.parametrize("d", [1, 7, 133, 2500])
def test_one_pass_is_the_plain_operations(variant, moments_wait, d):
    values, step = RowValues(IDS, factored(d).values(0, len(IDS))), replace(STEP, moments_wait=moments_wait)
    rest = [row for row in range(N) if row not in IDS]
    with native.variant(variant):
        for gradient in (values, factored(d)):
            have = updated("native", gradient, d, step=step)
            for mine, want in zip(have, updated("fused", gradient, d, step=step), strict=True):
                torch.testing.assert_close(mine, want, **FLOAT32_LAST_BITS)
            table, state = fresh(d)
            for mine, before in zip(have, (table, *state), strict=True):
                assert torch.equal(mine[rest], before[rest]) and not torch.equal(mine[IDS], before[IDS])
            assert have[3][IDS].tolist() == ([1, 4, 5, 4, 4, 1] if moments_wait else [8] * 6)
            assert (have[4][IDS] == step.log_decay_after).all()


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
    table, state = torch.ones(N, 40).bfloat16(), fresh(40, torch.bfloat16)[1]
    mean = state.mean.zero_()
    with backend.force("native"), native.variant(variant):
        adamw_rows(table, state, RowValues(IDS, values), replace(STEP, betas=(0.0, 0.95)))
    assert table[IDS[:3]].isnan().all() and mean[IDS[:3]].isnan().all()
    assert (mean[IDS[3:]] > 3e38).all() and mean[IDS[3:]].isposinf().any()


@built
@every_variant
def test_roots_and_quotients_are_rounded_as_the_processor_rounds_them(variant):
    """float64 rounded to float32 is the rounding of the exact root, and of the exact quotient."""
    patterns = torch.randint(0, 0x7F800001, (6, 4000), generator=torch.Generator().manual_seed(1))
    square = patterns.to(torch.int32).view(torch.float32)
    square[0, :3] = torch.tensor([0.0, torch.inf, torch.nan])
    table, state = torch.zeros(N, 4000), fresh(4000)[1]
    state.square[IDS] = square
    # one step of beta2 = 0 has no correction; many of others nearly none, and few of others a great one
    for betas, clock in ((0.0, 0.95), 0), ((0.9, 0.95), 0), ((0.9, 0.999), 3), ((0.5, 0.98), 200):
        state.clock[:], state.square[IDS], before = clock, square, draw(N, 4000, seed=clock)
        state.mean[:], table[:] = before, 0
        step = replace(STEP, betas=betas, eps=0.0)
        with backend.force("native"), native.variant(variant):
            adamw_rows(table, state, RowValues(IDS, torch.full((6, 4000), 1e-30)), step)
        size, correction = -step.lr / (1 - betas[0] ** (clock + 1)), math.sqrt(1 - betas[1] ** (clock + 1))
        root = (square * torch.tensor(betas[1])).double().sqrt().float()
        denominator = (root.double() / float(torch.tensor(correction))).float()
        above = (state.mean[IDS] * torch.tensor(size)).double()
        torch.testing.assert_close(table[IDS], (above / denominator).float(), rtol=0, atol=0, equal_nan=True)


@built
@pytest.mark.parametrize("moments_wait", [True, False])
def test_counts_whose_powers_share_a_place_are_told_apart(moments_wait):
    """Powers are kept by the last bits of their exponent: steps 256 apart, and none."""
    step, found = replace(STEP, number=600, moments_wait=moments_wait, betas=(0.999, 0.9999)), []
    for name in ("native", "fused"):
        table, state = fresh(20)
        state.clock[IDS] = torch.tensor([0, 256, 512, 0, 599, 255], dtype=torch.int32)
        with backend.force(name):
            adamw_rows(table, state, factored(20), step)
        found.append((table, *state))
    for mine, want in zip(*found, strict=True):
        torch.testing.assert_close(mine, want, **FLOAT32_LAST_BITS)


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
    table, state = fresh(4)
    with backend.force("native"):
        adamw_rows(table, state, nothing, STEP)
        assert torch.equal(table, draw(N, 4))
        for ids in ([0, N], [-1, 3], [3, 3], [4, 2]):
            with pytest.raises(ValueError, match="row ids must ascend within 0 to 49, each once"):
                row_adamw.adamw_rows(table, None, tuple(state), torch.tensor(ids), (), ())


@built
def test_float64_and_mixed_tables_take_the_plain_way(monkeypatch):
    monkeypatch.setattr(native, "run", None)
    gradient = RowValues(IDS, draw(6, 4))
    for dtype in (torch.float64, torch.float32):
        table, state = draw(N, 4).to(dtype), fresh(4)[1]
        mean = torch.zeros(N, 4, dtype=torch.float64 if dtype == torch.float64 else torch.bfloat16)
        adamw_rows(table, state._replace(mean=mean, square=torch.zeros_like(table)), gradient, STEP)
        assert not torch.equal(table, draw(N, 4).to(dtype))

"""AdamW on rows in one Triton kernel: as the plain operations, from values or factors, in float32 and bfloat16."""

from dataclasses import replace

import pytest
import torch

from moestro.ops import backend, triton_ffn
from moestro.ops.row_adamw import RowState, adamw_rows
from moestro.ops.row_gradients import FactoredRows, RowValues
from tests.ops.test_native_row_adamw import IDS, STEP, N, factored, fresh
from tests.ops.triton_cases import DEVICE, why_not
from tests.tolerances import FLOAT32_LAST_BITS

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())
REST = [row for row in range(N) if row not in IDS]


FIELDS = {RowValues: ("ids", "all"), FactoredRows: ("ids", "starts", "order", "source", "token", "coefficient")}


def there(gradient):
    """The gradient on the device of the kernels."""
    return type(gradient)(*(getattr(gradient, name).to(DEVICE) for name in FIELDS[type(gradient)]))


def updated(name: str, gradient, d: int, dtype=torch.float32, step=STEP):
    """A table and its state after one step on one backend."""
    table, state = fresh(d, dtype)
    table, state = table.to(DEVICE), RowState(*(part.to(DEVICE) for part in state))
    with backend.force(name):
        adamw_rows(table, state, there(gradient), step)
    return table, *state


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.3, 0.9)])
@pytest.mark.parametrize("moments_wait", [True, False])
@pytest.mark.parametrize("d", [1, 7, 133])
def test_one_kernel_is_the_plain_operations(d, moments_wait, betas):
    step = replace(STEP, moments_wait=moments_wait, betas=betas)
    for gradient in (factored(d), RowValues(IDS, factored(d).values(0, len(IDS)))):
        have, want = updated("triton", gradient, d, step=step), updated("fused", gradient, d, step=step)
        for mine, theirs, before in zip(have, want, (fresh(d)[0], *fresh(d)[1]), strict=True):
            torch.testing.assert_close(mine, theirs, **FLOAT32_LAST_BITS)
            assert torch.equal(mine[REST].cpu(), before[REST]) and not torch.equal(mine[IDS].cpu(), before[IDS])


def test_what_is_kept_in_bfloat16_is_rounded_by_the_same_bits():
    """Where float32 differs in its last bit, the neighbour may be the other one; with other bits, half of them were."""
    have, want = (updated(name, factored(200), 200, torch.bfloat16) for name in ("triton", "fused"))
    for mine, other in zip(have[:2], want[:2], strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine[IDS] != other[IDS]).float().mean() < 0.01
        torch.testing.assert_close(mine, other, rtol=2**-7, atol=0)
    torch.testing.assert_close(have[2], want[2], **FLOAT32_LAST_BITS)


def test_what_is_not_a_number_stays_so_and_the_greatest_become_infinite():
    values = torch.full((6, 40), -1, dtype=torch.int32).view(torch.float32)
    values[3:] = torch.finfo(torch.float32).max
    have, want = (updated(name, RowValues(IDS, values), 40, torch.bfloat16) for name in ("triton", "fused"))
    assert have[0][IDS[:3]].isnan().all() and have[1][IDS[:3]].isnan().all()
    for mine, other in zip(have, want, strict=True):
        torch.testing.assert_close(mine, other, rtol=2**-6, atol=0, equal_nan=True)


@pytest.mark.parametrize(("n", "d"), [(0, 5), (3, 0)])
def test_nothing_to_do_is_done(n, d):
    table, state = torch.ones(4, d, device=DEVICE), [torch.zeros(4, d, device=DEVICE) for _ in range(2)]
    clocks = torch.zeros(4, dtype=torch.int32, device=DEVICE), torch.zeros(4, dtype=torch.float64, device=DEVICE)
    with backend.force("triton"):
        adamw_rows(
            table, RowState(state[0], state[1], *clocks), there(RowValues(torch.arange(n), torch.ones(n, d))), STEP
        )
    assert torch.equal(table, torch.ones_like(table)) and int(clocks[0].sum()) == n


def test_float64_and_tables_out_of_reach_go_the_plain_way(monkeypatch):
    want = updated("fused", factored(7), 7)
    monkeypatch.setattr("moestro.ops.row_adamw.interprets", lambda: False)
    if DEVICE == "cpu":
        assert all(map(torch.equal, updated("triton", factored(7), 7), want))
    monkeypatch.setattr(triton_ffn, "find_spec", lambda name: None)
    assert not triton_ffn.interprets()
    wide = [updated(name, factored(7), 7, torch.float64) for name in ("triton", "fused")]
    assert all(map(torch.equal, *wide))

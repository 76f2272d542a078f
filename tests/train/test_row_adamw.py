"""AdamW on the rows a step touched: against torch where all are, against the equations where some are not."""

import math
from collections.abc import Sequence
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from moestro.ops import backend, row_gradients
from moestro.ops.row_gradients import coalesced_rows
from moestro.train.row_adamw import RowAdamW
from tests.tolerances import FLOAT32, FLOAT64

N, D, BETAS, EPS, DECAY = 40, 5, (0.9, 0.95), 1e-8, 0.1
Skipped = Literal["keep", "decay"]
both = pytest.mark.parametrize("skipped", ["keep", "decay"])


def rows(ids: Sequence[int], values: Tensor, n: int = N) -> Tensor:
    index = torch.tensor([list(ids)], dtype=torch.int64)
    return torch.sparse_coo_tensor(index, values, (n, values.shape[1]), is_coalesced=True, check_invariants=False)


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def rate(step: int) -> float:
    """A learning rate that changes every step, and is 0 in some."""
    return 0.03 * (step % 5) / 4


def touched(step: int) -> list[int]:
    """A random third of the rows; in one step none."""
    chosen = torch.rand(N, generator=torch.Generator().manual_seed(step)) < 0.33
    return [] if step == 7 else chosen.nonzero()[:, 0].tolist()


def optimizer_for(parameter: Tensor, skipped: Skipped = "keep", decay: float = DECAY) -> RowAdamW:
    return RowAdamW([parameter], lr=0.1, betas=BETAS, eps=EPS, weight_decay=decay, skipped=skipped)


def take(optimizer: torch.optim.Optimizer, parameter: Tensor, gradient: Tensor, lr: float) -> None:
    parameter.grad = gradient
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()


@pytest.fixture
def plain_torch():
    """Without native kernels, which round square roots correctly; torch, on MKL, does not."""
    with backend.force("fused"):
        yield


@both
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.usefixtures("plain_torch")
def test_with_every_row_in_every_step_it_is_torch_s_adamw_to_the_bit(skipped, foreach):
    ours = nn.Parameter(draw(0, N, 37, dtype=torch.float32))
    theirs = nn.Parameter(ours.detach().clone())
    one = optimizer_for(ours, skipped)
    other = torch.optim.AdamW([theirs], lr=0.1, betas=BETAS, eps=EPS, weight_decay=DECAY, foreach=foreach)
    for step in range(60):
        gradient = draw(step + 1, N, 37, dtype=torch.float32) * 10.0 ** -(step % 4)
        take(one, ours, rows(range(N), gradient), rate(step))
        take(other, theirs, gradient, rate(step))
        assert torch.equal(ours, theirs), step
    assert torch.equal(one.state[ours]["exp_avg"], other.state[theirs]["exp_avg"])
    assert torch.equal(one.state[ours]["exp_avg_sq"], other.state[theirs]["exp_avg_sq"])


class Reference:
    """The stated semantics by their equations, a dense table in loops: every row decays in every step; a row without
    a gradient moves by nothing else."""

    def __init__(self, table: Tensor, skipped: Skipped) -> None:
        self.table, self.skipped = table.clone(), skipped
        self.mean, self.square = torch.zeros_like(table), torch.zeros_like(table)
        self.count, self.steps = [0] * len(table), 0

    def step(self, ids: Sequence[int], values: Tensor, lr: float) -> None:
        gradients = dict(zip(ids, values, strict=True))
        self.steps += 1
        for r in range(len(self.table)):
            self.table[r] *= 1 - lr * DECAY
            g = gradients.get(r)
            if g is None and self.skipped == "keep":
                continue
            self.count[r] += 1
            g = torch.zeros(self.table.shape[1], dtype=self.table.dtype) if g is None else g
            self.mean[r] = BETAS[0] * self.mean[r] + (1 - BETAS[0]) * g
            self.square[r] = BETAS[1] * self.square[r] + (1 - BETAS[1]) * g**2
            if r in gradients:
                mean = self.mean[r] / (1 - BETAS[0] ** self.count[r])
                square = self.square[r] / (1 - BETAS[1] ** self.count[r])
                self.table[r] -= lr * mean / (square.sqrt() + EPS)


@both
def test_skipped_steps_are_as_stated(skipped):
    """Rows are compared when they have just been touched, all of them in the end: nothing is then pending."""
    parameter = nn.Parameter(draw(0, N, D))
    reference, optimizer = Reference(parameter.detach(), skipped), optimizer_for(parameter, skipped)
    longest, last = 0, [0] * N
    for step in range(1, 41):
        ids = touched(step) if step < 40 else list(range(N))
        longest = max([longest, *(step - last[r] for r in ids)])
        last = [step if r in ids else before for r, before in enumerate(last)]
        values = draw(step, len(ids), D)
        reference.step(ids, values, rate(step))
        take(optimizer, parameter, rows(ids, values), rate(step))
        torch.testing.assert_close(parameter[ids], reference.table[ids], **FLOAT64)
        torch.testing.assert_close(optimizer.state[parameter]["exp_avg"][ids], reference.mean[ids], **FLOAT64)
        torch.testing.assert_close(optimizer.state[parameter]["exp_avg_sq"][ids], reference.square[ids], **FLOAT64)
    assert longest > 6


def test_the_two_kinds_of_moments_differ():
    ends = []
    for skipped in ("keep", "decay"):
        parameter = nn.Parameter(draw(0, N, D))
        optimizer = optimizer_for(parameter, skipped)
        for step in range(1, 10):
            take(optimizer, parameter, rows(touched(step), draw(step, len(touched(step)), D)), 0.01)
        ends.append(parameter.detach())
    assert not torch.allclose(*ends)


@both
def test_decay_of_skipped_steps_is_charged_once_and_with_their_own_rates(skipped):
    parameter = nn.Parameter(torch.ones(2, 1, dtype=torch.float64))
    optimizer = optimizer_for(parameter, skipped)
    for lr in (0.5, 0.1, 0.3):
        take(optimizer, parameter, rows([0], torch.zeros(1, 1, dtype=torch.float64), n=2), lr)
        assert parameter[1].item() == 1.0
    take(optimizer, parameter, rows([0, 1], torch.zeros(2, 1, dtype=torch.float64), n=2), 0.2)
    expected = math.prod(1 - lr * DECAY for lr in (0.5, 0.1, 0.3, 0.2))
    assert parameter[:, 0].tolist() == pytest.approx([expected] * 2, rel=1e-14)


@both
def test_a_step_without_rows_is_a_step_and_one_without_gradient_is_none(skipped):
    parameter = nn.Parameter(torch.ones(2, 1, dtype=torch.float64))
    optimizer = optimizer_for(parameter, skipped)
    take(optimizer, parameter, rows([], torch.zeros(0, 1, dtype=torch.float64), n=2), 0.5)
    parameter.grad = None
    optimizer.step()
    assert parameter.tolist() == [[1.0], [1.0]]
    take(optimizer, parameter, rows([0], torch.zeros(1, 1, dtype=torch.float64), n=2), 0.1)
    assert parameter[0].item() == pytest.approx((1 - 0.5 * DECAY) * (1 - 0.1 * DECAY), rel=1e-14)


@both
def test_it_differs_from_dense_adam_only_on_rows_not_touched(skipped):
    """PEER's check 9: one step from a common state."""
    ours = nn.Parameter(draw(0, N, D))
    theirs = nn.Parameter(ours.detach().clone())
    one = optimizer_for(ours, skipped, decay=0.0)
    other = torch.optim.AdamW([theirs], lr=0.1, betas=BETAS, eps=EPS, weight_decay=0.0)
    everything, ids = draw(1, N, D), [3, 17, 20]
    take(one, ours, rows(range(N), everything), 0.1)
    take(other, theirs, everything, 0.1)
    before = ours.detach().clone()
    some = draw(2, len(ids), D)
    take(one, ours, rows(ids, some), 0.1)
    take(other, theirs, rows(ids, some).to_dense(), 0.1)
    torch.testing.assert_close(ours[ids], theirs[ids], **FLOAT64)
    rest = [r for r in range(N) if r not in ids]
    assert torch.equal(ours[rest], before[rest])
    assert (theirs[rest] != before[rest]).all()


def test_work_in_pieces_changes_no_bit(monkeypatch):
    ends = []
    for chunk in (2**17, 3 * D):
        monkeypatch.setattr(row_gradients, "CHUNK", chunk)
        parameter = nn.Parameter(draw(0, N, D))
        optimizer = optimizer_for(parameter, "decay")
        for step in range(1, 9):
            take(optimizer, parameter, rows(touched(step), draw(step, len(touched(step)), D)), rate(step))
        ends.append((parameter.detach(), *optimizer.state[parameter].values()))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@both
def test_a_restored_optimizer_goes_on_to_the_bit(skipped):
    parameter = nn.Parameter(draw(0, N, D, dtype=torch.float32))
    optimizer = optimizer_for(parameter, skipped)
    for step in range(1, 20):
        if step == 10:
            saved = optimizer.state_dict()
            twin = nn.Parameter(parameter.detach().clone())
            resumed = optimizer_for(twin, skipped)
            resumed.load_state_dict(saved)
            pairs = zip(resumed.state[twin].items(), optimizer.state[parameter].items(), strict=True)
            assert all(a == b and x.dtype == y.dtype and x is not y for (a, x), (b, y) in pairs)
        gradient = rows(touched(step), draw(step, len(touched(step)), D, dtype=torch.float32))
        take(optimizer, parameter, gradient, rate(step))
        if step >= 10:
            take(resumed, twin, gradient.clone(), rate(step))
            assert torch.equal(parameter, twin)


def test_accumulated_rows_are_merged_without_a_copy():
    parameter = nn.Parameter(torch.zeros(N, D))
    once = draw(0, 3, D, dtype=torch.float32)
    parameter.grad = rows([2, 5, 9], once.clone())
    parameter.grad += rows([5, 30], torch.ones(2, D))
    values_at = parameter.grad._values().data_ptr()
    # torch forgets that both were coalesced when one of them came out of its own accumulation
    parameter.grad = parameter.grad.clone()._coalesced_(False)
    kept = parameter.grad._values().data_ptr()
    ids, values = coalesced_rows(parameter)
    assert ids.tolist() == [2, 5, 9, 30] and kept == values.data_ptr() != values_at
    torch.testing.assert_close(values, torch.stack([once[0], once[1] + 1, once[2], torch.ones(D)]), **FLOAT32)
    assert parameter.grad.is_coalesced()


def test_rows_in_any_order_and_more_than_once_are_summed():
    parameter = nn.Parameter(torch.zeros(N, 1))
    index = torch.tensor([[5, 2, 5]])
    parameter.grad = torch.sparse_coo_tensor(index, torch.tensor([[1.0], [2.0], [3.0]]), (N, 1), check_invariants=False)
    ids, values = coalesced_rows(parameter)
    assert (ids.tolist(), values[:, 0].tolist()) == ([2, 5], [2.0, 4.0])


def test_what_cannot_be_is_refused():
    parameter = nn.Parameter(torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"skipped='lose', allowed: keep, decay"):
        RowAdamW([parameter], skipped="lose")
    with pytest.raises(ValueError, match=r"betas=\[0\.9, 1\.0\]"):
        RowAdamW([parameter], betas=(0.9, 1.0))
    parameter.grad = torch.ones(3, 2)
    with pytest.raises(ValueError, match=r"sparse over rows \(torch\.sparse_coo\), got torch\.strided"):
        RowAdamW([parameter]).step()
    parameter.grad = torch.ones(3, 2).to_sparse()
    with pytest.raises(ValueError, match="sparse over rows"):
        RowAdamW([parameter]).step()
    with pytest.raises(ValueError, match=r"lr=10\.0 \* weight_decay=0\.1: must be below 1"):
        RowAdamW([parameter], lr=10.0, weight_decay=0.1).step()

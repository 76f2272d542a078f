"""Tables in bfloat16: rounded stochastically, so that small steps add up, and resumed to the bit."""

import pytest
import torch
from torch import nn

from moestro.ops import backend
from moestro.ops.rounding import rounding_key, stochastic_bfloat16
from moestro.train import OptimSettings, train
from moestro.train.checkpoint import read_tensors
from tests.ops.test_singleton_experts import CASES, inputs
from tests.ops.test_singleton_rows import run
from tests.tolerances import BFLOAT16_NORM, FLOAT32, FLOAT64
from tests.train.test_resume import Killed, Mortal, require_equal_runs
from tests.train.test_row_adamw import D, both, draw, optimizer_for, rows, take
from tests.train.test_row_training import TABLES, model_with_rows
from tests.train.tiny import Counting, tiny_model, tiny_settings


@both
@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_is_float32_s_and_then_rounded(skipped, compiled):
    """In plain torch, and by the kernels where they are built."""
    start = draw(0, 40, D, dtype=torch.bfloat16)
    half, single = nn.Parameter(start.clone()), nn.Parameter(start.float())
    one, other = optimizer_for(half, skipped), optimizer_for(single, skipped)
    gradient = draw(1, 2, D, dtype=torch.bfloat16)
    with backend.force(backend.active() if compiled else "fused"):
        take(one, half, rows([1, 4], gradient.clone()), 0.1)
        take(other, single, rows([1, 4], gradient.float()), 0.1)
    ids, key = torch.tensor([1, 4]), rounding_key(1, 1)
    mine, theirs = one.state[half], other.state[single]
    assert (mine["exp_avg"].dtype, mine["exp_avg_sq"].dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(half[ids], stochastic_bfloat16(single[ids].detach(), ids, rounding_key(key, 0)))
    assert torch.equal(mine["exp_avg"][ids], stochastic_bfloat16(theirs["exp_avg"][ids], ids, rounding_key(key, 1)))
    assert torch.equal(mine["exp_avg_sq"], theirs["exp_avg_sq"])
    rest = [r for r in range(40) if r not in (1, 4)]
    assert torch.equal(half[rest], start[rest])


def test_steps_too_small_for_bfloat16_add_up():
    """300 steps of 1e-5 from 1: to nearest, none would move it."""
    table = nn.Parameter(torch.ones(64, 32, dtype=torch.bfloat16))
    optimizer = optimizer_for(table, decay=0.0)
    gradient = torch.ones(64, 32, dtype=torch.bfloat16)
    for _ in range(300):
        take(optimizer, table, rows(range(64), gradient.clone(), n=64), 1e-5)
    assert 1 - table.detach().double().mean().item() == pytest.approx(0.003, rel=0.1)
    assert float(torch.tensor(1.0).bfloat16() - 1e-5) == 1.0


def test_tables_round_differently():
    tables = [nn.Parameter(torch.ones(64, 32, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = optimizer_for(tables[0], decay=0.0)
    optimizer.param_groups[0]["params"].append(tables[1])
    for table in tables:
        table.grad = rows(range(64), torch.ones(64, 32, dtype=torch.bfloat16), n=64)
    optimizer.param_groups[0]["lr"] = 1e-3
    optimizer.step()
    assert 0 < (tables[0] != tables[1]).float().mean() < 0.5


def test_reading_widens_rows_and_computes_in_float32():
    x, ids, weight, up, down = inputs(*CASES["63 tokens"], torch.float32)
    narrow = (x, ids, weight, up.bfloat16(), down.bfloat16())
    y, (dx, dweight, *tables) = run(narrow, sparse=True)
    want, (want_dx, want_dweight, *want_tables) = run((*narrow[:3], *(t.float() for t in narrow[3:])), sparse=True)
    assert y.dtype == dx.dtype == torch.float32
    for have, expected in ((y, want), (dx, want_dx), (dweight, want_dweight)):
        torch.testing.assert_close(have, expected, **FLOAT32)
    for have, expected in zip(tables, want_tables, strict=True):
        error = (have.to_dense().float() - expected.to_dense()).norm() / expected.to_dense().norm()
        assert have.dtype == torch.bfloat16 and error < BFLOAT16_NORM
    defined, _ = run(narrow, sparse=True, name="reference")
    torch.testing.assert_close(y, defined, **FLOAT32)


def settings(fused: bool, **changes):
    optim = OptimSettings(lr=0.01, fused_rows=fused)
    return tiny_settings(6, save_every=2, eval_every=3, keep_last=1, accumulate=2, optim=optim, **changes)


@pytest.mark.parametrize("fused", [False, True])
def test_dying_changes_no_bit(tmp_path, fused):
    narrow = settings(fused, table_precision="bf16")
    train(model_with_rows(), Counting(), narrow, [], [], tmp_path / "whole")
    stored = read_tensors(tmp_path / "whole" / "checkpoints" / "step-00000006", "model")
    assert {stored[name].dtype for name in TABLES} == {torch.bfloat16}
    for last in (1, 2, 5):
        run_dir = tmp_path / str(last)
        with pytest.raises(Killed):
            train(model_with_rows(), Mortal(last), narrow, [], [], run_dir)
        train(model_with_rows(), Counting(), narrow, [], [], run_dir)
        require_equal_runs(run_dir, tmp_path / "whole", 6)


def test_fused_rows_train_as_values_do(tmp_path):
    """Sums over tokens are taken in another order where micro-batches are merged."""
    ends = []
    for fused in (False, True):
        model = model_with_rows().double()
        train(model, Counting(), settings(fused), [], [], tmp_path / str(fused))
        ends.append(model.state_dict())
        assert all((model.get_parameter(name).grad is None) is fused for name in TABLES)
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], **FLOAT64)


def test_fused_rows_are_those_of_values_to_the_bit_where_nothing_is_clipped_or_accumulated(tmp_path):
    ends = []
    for fused in (False, True):
        model = model_with_rows()
        optim = OptimSettings(lr=0.01, fused_rows=fused, clip=None)
        train(model, Counting(), tiny_settings(6, optim=optim), [], [], tmp_path / str(fused))
        ends.append(model.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"table_precision": "bf16"}, "train table_precision=bf16: no bank trains by rows"),
        ({"table_folder": "tables"}, "train table_folder=tables: no bank trains by rows"),
        ({"optim": OptimSettings(fused_rows=True)}, "optim fused_rows=True: no bank trains by rows"),
    ],
)
def test_a_model_without_such_tables_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train(tiny_model(), Counting(), tiny_settings(2, **changes), [], [], tmp_path)


def test_other_precisions_are_refused():
    with pytest.raises(ValueError, match="train table_precision='int8': allowed are 'fp32', 'bf16'"):
        tiny_settings(2, table_precision="int8")

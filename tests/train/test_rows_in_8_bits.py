"""Tables in 8 bits that learn: gradients of the numbers that rows stand for, and AdamW rounded between neighbours."""

import math

import pytest
import torch

from moestro.experts import QuantizedBank, SingletonBank
from moestro.layers import MoELayer
from moestro.model import Attention, Block, Transformer
from moestro.ops import backend, native
from moestro.ops.quantized import QuantizedTable, quantize_rows
from moestro.ops.row_adamw import RowState, RowStep, adamw_rows
from moestro.ops.row_gradients import FactoredRows, RowValues, collect_factors, row_gradient
from moestro.routers import ProductKeyRouter
from moestro.routing import SparseRouting
from moestro.train import OptimSettings, train
from moestro.train.checkpoint import read_tensors
from moestro.train.estimate import table_bytes
from moestro.train.optim import build_optimizer
from tests.ops.test_singleton_experts import inputs
from tests.tolerances import FLOAT64
from tests.train.test_resume import Killed, Mortal, require_equal_runs
from tests.train.tiny import VOCABULARY, WIDTH, Counting, moe, tiny_settings

each_storage = pytest.mark.parametrize("storage", ["int8", "fp8"])
E, D = 40, 24


def codes_of(storage):
    """All codes that are numbers, ascending, as numbers."""
    if storage == "int8":
        return torch.arange(-127, 128).double()
    every = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).double()
    return every[every.isfinite()].unique()


def learning(storage="int8", n=64, d=16, glu=False, **options):
    torch.manual_seed(0)
    return QuantizedBank(d, n, "silu" if glu else "gelu", storage, glu, sparse_gradients=True, **options)


def drawn(seed, rows=E, d=D):
    """Rows of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, d, generator=generator) * torch.logspace(-3, 3, rows)[:, None]


def dense(table):
    return table.rows(torch.arange(len(table.scale)), torch.float64)


@each_storage
@pytest.mark.parametrize("glu", [False, True])
def test_gradients_are_those_of_the_numbers_that_rows_stand_for(storage, glu):
    """Beside autograd on the widened tables, in float64, over two backward passes."""
    bank = learning(storage, glu=glu).double()
    collect_factors(bank.row_parameters())
    wide = {name: dense(table).requires_grad_() for name, table in bank.tables().items()}
    act = torch.nn.functional.silu if glu else torch.nn.functional.gelu
    for _ in range(2):
        x, ids, weight = inputs(9, 5, 64, 16)[:3]
        ours, theirs = ([v.clone().requires_grad_() for v in (x, weight)] for _ in range(2))
        y = bank(ours[0], SparseRouting.from_topk(ids, ours[1], 64))
        along = {name: torch.einsum("tkd,td->tk", wide[name][ids], theirs[0]) for name in wide if name != "down"}
        hidden = act(along["gate"]) * along["up"] if glu else act(along["up"])
        want = torch.einsum("tk,tkd->td", hidden * theirs[1], wide["down"][ids])
        for out in (y, want):
            out.square().sum().backward()
        torch.testing.assert_close(y, want, **FLOAT64)
        for mine, their in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine.grad, their.grad, **FLOAT64)
    for codes, name in zip(bank.row_parameters(), ("gate", "up", "down") if glu else ("up", "down"), strict=True):
        gradient = row_gradient(codes)
        have = torch.zeros(64, 16, dtype=torch.float64)
        have[gradient.ids] = gradient.values(0, len(gradient.ids)).double()
        torch.testing.assert_close(have, wide[name].grad, **FLOAT64)


@pytest.mark.parametrize("routed", [False, True])
def test_tables_learn_where_nothing_before_them_does(routed):
    """No gradient of inputs is wanted, nor perhaps of gates."""
    bank = learning(glu=True)
    collect_factors(bank.row_parameters())
    x, ids, weight = inputs(9, 5, 64, 16, torch.float32)[:3]
    weight = weight.requires_grad_(routed)
    bank(x, SparseRouting.from_topk(ids, weight, 64)).sum().backward()
    assert all(row_gradient(codes) is not None for codes in bank.row_parameters())
    with torch.no_grad():
        assert not bank(x, SparseRouting.from_topk(ids, weight, 64)).requires_grad


def one_step(table, gradient, ids, key=5):
    """AdamW's first step on some rows; returns its state."""
    n, d = table.codes.shape if isinstance(table, QuantizedTable) else table.shape
    state = state_of(n, d)
    adamw_rows(table, state, RowValues(ids, gradient.clone()), step_number(1, key))
    return state


def state_of(n, d, first=torch.float32):
    moments = torch.zeros(n, d, dtype=first), torch.zeros(n, d)
    return RowState(*moments, torch.zeros(n, dtype=torch.int32), torch.zeros(n).double())


def step_number(number, key):
    return RowStep(number, 0.01, 0.1, (0.9, 0.999), 1e-8, 0.0, True, key)


@each_storage
def test_every_new_number_is_one_of_the_two_codes_beside_adamw_s(storage):
    table, ids = quantize_rows(drawn(0), storage), torch.arange(0, E, 3)
    before, exact, gradient = dense(table), dense(table).float(), drawn(1)[ids]
    mine, theirs = one_step(table, gradient, ids), one_step(exact, gradient, ids)
    assert all(torch.equal(a, b) for a, b in zip(mine[1:], theirs[1:], strict=True))
    numbers = exact[ids].double() / table.scale[ids, None].double()
    codes, rounding = codes_of(storage), 1 + 1e-6 * numbers.sign()
    lower = codes[torch.searchsorted(codes, numbers / rounding, right=True).sub(1).clamp(min=0)]
    upper = codes[torch.searchsorted(codes, numbers * rounding).clamp(max=len(codes) - 1)]
    new = table.codes[ids].double()
    assert ((new >= lower) & (new <= upper)).all()
    assert (lower < upper).double().mean() > 0.9
    others = [e for e in range(E) if e not in ids.tolist()]
    assert torch.equal(dense(table)[others], before[others])


@each_storage
@pytest.mark.parametrize("d", [1, 24, 50, 64])
@pytest.mark.parametrize("variant", native.variants())
def test_kernels_change_the_same_codes_and_scales_as_plain_torch(variant, d, storage):
    with native.variant(variant):
        require_same_codes(steps_taken("native", d, storage), steps_taken("fused", d, storage))


def steps_taken(name, d, storage, device="cpu"):
    """Codes, scales and state after steps on one backend in which rows grow, shrink and become no numbers; gradients
    are values and factors."""
    stored, state = quantize_rows(drawn(0, E, d), storage), state_of(E, d, torch.bfloat16)
    table = QuantizedTable(stored.codes.to(device), stored.scale.to(device))
    state, generator = RowState(*(part.to(device) for part in state)), torch.Generator().manual_seed(1)
    for number in range(1, 7):
        ids = torch.randperm(E, generator=generator)[:17].sort().values
        if number == 4:
            table.scale[ids[:3]] *= torch.tensor([1e-3, 1e4, float("nan")]).to(device)
        if number % 2:
            starts, token = torch.arange(0, 35, 2), torch.arange(34) % 9
            source, weight = drawn(10 + number, 9, d), torch.rand(34, generator=generator)
            places = starts, torch.randperm(34, generator=generator), source, token, weight
            gradient = FactoredRows(*(part.to(device) for part in (ids, *places)))
        else:
            gradient = RowValues(ids.to(device), (drawn(number, 17, d) * 10.0 ** (number - 3)).to(device))
        with backend.force(name):
            adamw_rows(table, state, gradient, step_number(number, 7 * number))
    return [part.cpu() for part in (table.codes.view(torch.uint8), table.scale, *state)]


def require_same_codes(have, want):
    """Roots and sums may differ in their last bits, which sends few numbers to the other neighbour."""
    broken = have[1].isnan()
    assert broken.sum() == 1
    for mine, theirs in zip(have[1:], want[1:], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2**-7, atol=1e-30, equal_nan=True)
    assert (have[0] == want[0]).double().mean() > 0.995
    moved = (have[0].view(torch.int8).int() - want[0].view(torch.int8).int()).abs()
    assert moved[~broken].max() <= 1


@each_storage
def test_rounding_is_right_on_average_and_codes_that_do_not_change_stay(storage):
    rows, ids = drawn(2, 8, 500), torch.arange(8)
    table = quantize_rows(torch.zeros(8, 500), storage)
    table.replace_rows(ids, rows, 0)
    first = dense(table)
    table.replace_rows(ids, first.float(), 1)
    assert torch.equal(dense(table), first)
    total = torch.zeros_like(first)
    for key in range(400):
        table.replace_rows(ids, rows, key)
        total += dense(table)
    gap = table.scale[:, None] if storage == "int8" else torch.maximum(rows.abs() / 8, table.scale[:, None] / 512)
    # a mean of 400: a standard deviation of at most gap / 40
    assert (total / 400 - rows).abs().max(1).values.le(gap.amax(1) / 40 * 5).all()
    assert (total / 400 - rows).abs().div(gap).mean() < 1 / 40


def test_a_row_keeps_its_scale_while_its_numbers_fit():
    table, ids = quantize_rows(torch.ones(4, 3), "int8"), torch.arange(4)
    table.scale.fill_(2.0)
    sizes = torch.tensor([254.0, 255.0, 64.0, 63.0])
    table.replace_rows(ids, sizes[:, None].expand(4, 3), 0)
    assert table.scale.tolist() == [2.0, 4.0, 2.0, 0.5]
    assert ((table.codes.float() * table.scale[:, None] - sizes[:, None]).abs() <= table.scale[:, None]).all()
    table.replace_rows(ids, torch.zeros(4, 3), 0)
    assert not table.codes.any()
    table.replace_rows(ids[:2], torch.tensor([[1.0, float("nan"), 2.0], [float("inf"), 0.0, 1.0]]), 0)
    assert dense(table)[:2].isnan().all() and not dense(table)[2:].any()


def tiny(storage="int8", sparse=True):
    """A decoder with a layer of experts in 8 bits."""
    torch.manual_seed(0)
    router = ProductKeyRouter(WIDTH, 256, heads=2, top_k=3, d_key=4, query_norm="rms")
    made = {"int8": QuantizedBank, "fp8": QuantizedBank, "fp32": SingletonBank}[storage]
    options = {} if storage == "fp32" else {"storage": storage}
    layer = MoELayer(router, [made(WIDTH, 256, heads=2, top_k=3, sparse_gradients=sparse, **options)])
    return Transformer(VOCABULARY, WIDTH, [Block(WIDTH, Attention(WIDTH, n_heads=2), f) for f in (moe(), layer)])


def settings(steps=6, **changes):
    optim = OptimSettings(lr=0.01, fused_rows=True)
    return tiny_settings(steps, save_every=2, eval_every=3, keep_last=1, accumulate=2, optim=optim, **changes)


@each_storage
def test_dying_changes_no_bit(tmp_path, storage):
    train(tiny(storage), Counting(), settings(), [], [], tmp_path / "whole")
    stored = read_tensors(tmp_path / "whole" / "checkpoints" / "step-00000006", "model")
    assert {v.dtype for n, v in stored.items() if "codes" in n} == {torch.int8 if storage == "int8" else torch.uint8}
    kept = read_tensors(tmp_path / "whole" / "checkpoints" / "step-00000006", "optimizer")
    assert {v.dtype for n, v in kept.items() if "codes/exp_avg" in n} == {torch.bfloat16, torch.float32}
    for last in (1, 2, 5):
        run_dir = tmp_path / str(last)
        with pytest.raises(Killed):
            train(tiny(storage), Mortal(last), settings(), [], [], run_dir)
        train(tiny(storage), Counting(), settings(), [], [], run_dir)
        require_equal_runs(run_dir, tmp_path / "whole", 6)


@each_storage
def test_only_rows_that_were_met_change(tmp_path, storage):
    model = tiny(storage)
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if "codes" in name}
    train(model, Counting(), settings(steps=1), [], [], tmp_path)
    for name, codes in before.items():
        changed = (model.get_buffer(name) != codes).any(1)
        assert 20 < changed.sum() < 200, name


@pytest.mark.slow
def test_tables_in_8_bits_learn_what_tables_in_float32_do(tmp_path):
    """Everything else frozen: what is learned is learned by them."""
    losses = {}
    for storage in ("fp32", "int8", "fp8"):
        model = tiny(storage)
        tables = {id(parameter) for parameter in model.blocks[1].ffn.bank.parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in tables)
        optim = OptimSettings(lr=0.03, fused_rows=True)
        end = train(model, Counting(), tiny_settings(80, optim=optim), [], [], tmp_path / storage)
        losses[storage] = end["eval"]["loss"]
    untrained = math.log(VOCABULARY)
    assert losses["fp32"] < untrained - 0.3
    assert all(abs(losses[storage] - losses["fp32"]) < 0.03 for storage in ("int8", "fp8"))


def test_what_cannot_be_is_refused(tmp_path):
    model = tiny()
    with pytest.raises(ValueError, match="fused_rows=False: tables in 8 bits have no gradients but in factors"):
        build_optimizer(model, OptimSettings())
    bank = learning()
    x, ids, weight = inputs(9, 5, 64, 16, torch.float32)[:3]
    uneven = SparseRouting(torch.tensor([0, 0, 1]), torch.tensor([1, 2, 3]), torch.ones(3), 9, 64)
    with pytest.raises(ValueError, match="equally many experts each"):
        bank(x, uneven)
    assert bank.eval()(x, uneven).isfinite().all()


def test_fixed_tables_are_no_optimizer_s():
    model = tiny(sparse=False)
    names = {id(b) for b in model.buffers()}
    optimizer = build_optimizer(model, OptimSettings())
    assert not any(id(p) in names for group in optimizer.param_groups for p in group["params"])


def test_memory_is_codes_scales_both_moments_and_clocks(tmp_path):
    model = tiny()
    train(model, Counting(), settings(steps=1), [], [], tmp_path)
    optimizer = build_optimizer(model, settings().optim)
    (rows,) = (part for part in optimizer.parts if hasattr(part, "quantized"))
    state = [entry for codes in rows.quantized for entry in rows._state_of(codes).values() if entry.ndim]
    tables = [t for table in rows.quantized.values() for t in (table.codes, table.scale)]
    assert sum(t.nbytes for t in (*tables, *state)) == table_bytes(model, settings())

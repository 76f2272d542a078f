"""Tables in 8 bits: within their bounds, read as they are, and saved and loaded as parts of models."""

import pytest
import torch

from moestro.experts import GLUSingletonBank, QuantizedBank, SingletonBank, quantize_banks, quantized
from moestro.layers import MoELayer
from moestro.ops.quantized import quantize_rows
from moestro.routers import ProductKeyRouter
from moestro.routing import SparseRouting
from tests.ops.test_singleton_experts import CASES, inputs
from tests.ops.test_singleton_rows import largest_allocation
from tests.tolerances import FLOAT32, FLOAT64

each_storage = pytest.mark.parametrize("storage", ["int8", "fp8"])
# relative error of a layer's output, to the norm: half a code of 127 and of 16 steps, times a few
ERROR = {"int8": 2e-2, "fp8": 8e-2}


def table(rows: int = 300, d: int = 17) -> torch.Tensor:
    """Rows of very different sizes; one of zeros."""
    drawn = torch.randn(rows, d, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 4, rows)[:, None]
    drawn[7] = 0
    return drawn


def everything(stored) -> torch.Tensor:
    return stored.rows(torch.arange(len(stored.scale)), torch.float64)


def test_int8_is_off_by_half_a_scale_at_most():
    exact, stored = table().double(), quantize_rows(table(), "int8")
    assert stored.codes.dtype == torch.int8 and stored.codes.abs().amax(1)[8:].eq(127).all()
    assert ((everything(stored) - exact).abs() <= stored.scale[:, None] * (0.5 + 1e-5)).all()
    torch.testing.assert_close(stored.scale[8:].double() * 127, exact.abs().amax(1)[8:], **FLOAT32)


def test_fp8_is_off_by_a_sixteenth_at_most():
    exact, stored = table().double(), quantize_rows(table(), "fp8")
    assert stored.codes.dtype == torch.float8_e4m3fn
    bound = torch.maximum(exact.abs() / 16, stored.scale[:, None].double() / 1024) * (1 + 1e-5)
    assert ((everything(stored) - exact).abs() <= bound).all()


@each_storage
def test_a_row_of_zeros_stays_so_and_codes_stay_themselves(storage):
    stored = quantize_rows(table(), storage)
    assert not everything(stored)[7].any()
    again = quantize_rows(everything(stored).float(), storage)
    torch.testing.assert_close(everything(again), everything(stored), **FLOAT32)


@each_storage
@pytest.mark.parametrize("make", [SingletonBank, GLUSingletonBank])
@pytest.mark.parametrize("case", CASES)
def test_a_layer_computes_what_its_widened_tables_would(case, make, storage):
    """Outputs, and gradients of what comes in, in float64; beside the exact bank, within the storage's error."""
    tokens, k, n, d = CASES[case]
    torch.manual_seed(0)
    bank = make(d, n).double()
    small = quantized(bank, storage)
    wide = make(d, n).double()
    for name, stored in small.tables().items():
        getattr(wide, name).data = everything(stored)
    x, ids, weight = inputs(tokens, k, n, d)[:3]
    found = []
    for one in (small, wide, bank):
        leaves = [v.clone().requires_grad_() for v in (x, weight)]
        y = one(leaves[0], SparseRouting.from_topk(ids, leaves[1], n))
        y.square().sum().backward()
        found.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for have, want in zip(found[0], found[1], strict=True):
        torch.testing.assert_close(have, want, **FLOAT64)
    error = (found[0][0] - found[2][0]).norm()
    assert error <= ERROR[storage] * found[2][0].norm() and (error > 0) == bool(found[2][0].any())


def decoder_layers() -> torch.nn.Sequential:
    """Two layers with one bank, and one with its own."""
    torch.manual_seed(0)
    shared, own = SingletonBank(16, 64, sparse_gradients=True), GLUSingletonBank(16, 64)
    make = lambda bank: MoELayer(ProductKeyRouter(16, 64, 2, 4, 8, query_norm="rms"), [bank])  # noqa: E731
    return torch.nn.Sequential(make(shared), make(own), make(shared))


def outputs(model: torch.nn.Sequential) -> list[torch.Tensor]:
    x = torch.randn(9, 16, generator=torch.Generator().manual_seed(1))
    return [layer(x)[0] for layer in model]


@each_storage
def test_the_banks_of_a_model_are_replaced_and_come_back_from_what_was_saved(storage):
    model = decoder_layers()
    before, bytes_before = outputs(model), sum(p.nbytes for p in model[1].bank.parameters())
    assert quantize_banks(model, storage) == [f"{i}.branches.0" for i in range(3)]
    assert model[0].bank is model[2].bank and isinstance(model[0].bank, QuantizedBank)
    assert not list(model[0].bank.parameters()) and sum(b.nbytes for b in model[1].bank.buffers()) < bytes_before / 3
    after = outputs(model)
    for y, want in zip(after, before, strict=True):
        assert (y - want).norm() < ERROR[storage] * want.norm()
    empty = decoder_layers()
    quantize_banks(empty, storage)
    for layer, glu in zip(empty, (False, True, False), strict=True):
        layer.branches[0] = QuantizedBank(16, 64, "silu" if glu else "gelu", storage, glu)
    empty.load_state_dict(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(outputs(empty), after, strict=True))
    # conversions of a whole model leave the codes alone
    codes = model[0].bank.up_codes.clone()
    assert torch.equal(model.double()[0].bank.up_codes, codes)


@each_storage
def test_nothing_of_a_table_s_size_is_widened(storage):
    bank = quantized(SingletonBank(64, 64**2), storage)
    x, ids, weight = inputs(8, 4, 64**2, 64, torch.float32)[:3]
    work = lambda: bank(x.requires_grad_(), SparseRouting.from_topk(ids, weight, 64**2)).sum().backward()  # noqa: E731
    assert largest_allocation(work) < 64**2 * 64 * 4 / 3


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"storage='int4', allowed: int8, fp8"):
        quantized(SingletonBank(4, 9), "int4")
    with pytest.raises(ValueError, match="Linear has no bank of one-neuron experts"):
        quantize_banks(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="n_experts=0, allowed: at least 1"):
        QuantizedBank(4, 0)


@pytest.mark.parametrize("storage", ["int8", "fp8"])
def test_a_scale_that_rounds_to_zero_makes_a_row_of_zeros(storage):
    table = quantize_rows(torch.tensor([[1e-44, 0.0, -1e-44]]), storage)
    assert torch.equal(table.rows(torch.tensor([0]), torch.float32), torch.zeros(1, 3))

"""Table gradients as rows: equal to the dense ones, and nothing of the table's size anywhere."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from moestro import ops
from moestro.experts import SingletonBank
from moestro.ops import backend, table_rows
from moestro.routing import SparseRouting
from tests.ops.test_singleton_experts import CASES, inputs
from tests.tolerances import BFLOAT16_NORM, FLOAT64


def run(arguments, sparse, name="fused", activation="gelu"):
    x, ids, weight, up, down = arguments
    leaves = [v.detach().clone().requires_grad_() for v in (x, weight, up, down)]
    with backend.force(name):
        y = ops.singleton_experts(leaves[0], ids, *leaves[1:], activation, sparse)
    (y * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return y, [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_rows_are_those_of_the_dense_gradient_to_the_bit(case, dtype):
    arguments = inputs(*CASES[case], dtype)
    y, (dx, dweight, *tables) = run(arguments, sparse=True)
    dense_y, (dense_dx, dense_dweight, *dense_tables) = run(arguments, sparse=False)
    assert torch.equal(y, dense_y) and torch.equal(dx, dense_dx) and torch.equal(dweight, dense_dweight)
    met = arguments[1].unique()
    for table, dense in zip(tables, dense_tables, strict=True):
        assert table.layout == torch.sparse_coo and table.shape == dense.shape
        assert torch.equal(table._indices()[0], met) and table._values().shape == (len(met), dense.shape[1])
        assert torch.equal(table.to_dense(), dense)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu", "none"])
def test_rows_equal_the_definition_s(activation):
    arguments = inputs(*CASES["63 tokens"])
    want, want_gradients = run(arguments, True, "reference", activation)
    have, have_gradients = run(arguments, True, "fused", activation)
    torch.testing.assert_close(have, want, **FLOAT64)
    assert [g.is_sparse for g in want_gradients] == [g.is_sparse for g in have_gradients] == [False, False, True, True]
    for mine, theirs in zip(have_gradients, want_gradients, strict=True):
        torch.testing.assert_close(mine.to_dense(), theirs.to_dense(), **FLOAT64)


def test_an_sgd_step_is_that_of_dense_gradients():
    """PEER's check 9, first half."""
    arguments = inputs(*CASES["63 tokens"])
    ends = []
    for sparse in (True, False):
        _, (_, _, up_gradient, down_gradient) = run(arguments, sparse)
        tables = [torch.nn.Parameter(v.clone()) for v in arguments[3:]]
        for table, gradient in zip(tables, (up_gradient, down_gradient), strict=True):
            table.grad = gradient
        torch.optim.SGD(tables, lr=0.3).step()
        ends.append(tables)
    for mine, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(mine, theirs, **FLOAT64)


@pytest.mark.parametrize("fixed", [True, False])
def test_gradients_of_two_batches_accumulate_to_those_of_both(fixed):
    """Also where tokens have different numbers of experts (`fixed` False), which takes the grouped way."""
    torch.manual_seed(0)
    bank = SingletonBank(4, 50, sparse_gradients=True).double()
    x, ids, weight = inputs(30, 3, 50, 4)[:3]

    def backward(rows: slice) -> None:
        routing = SparseRouting.from_topk(ids[rows], weight[rows], 50)
        routing = routing if fixed else routing.grouped()
        bank(x[rows], routing).square().sum().backward()

    backward(slice(0, 30))
    whole = [p.grad.to_dense() for p in bank.parameters()]
    bank.zero_grad()
    backward(slice(0, 17))
    backward(slice(17, 30))
    for parameter, want in zip(bank.parameters(), whole, strict=True):
        assert parameter.grad.is_sparse
        assert fixed is False or parameter.grad._nnz() == len(ids.unique())
        torch.testing.assert_close(parameter.grad.to_dense(), want, **FLOAT64)


def test_autocast_makes_no_copy_of_the_tables_and_rounds_inputs_and_output():
    arguments = inputs(40, 4, 64, 16, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, gradients = run(arguments, sparse=True)
        bag, _ = run(arguments, sparse=False)
    exact, exact_gradients = run([v.double() if v.is_floating_point() else v for v in arguments], sparse=True)
    assert y.dtype == bag.dtype == torch.bfloat16
    assert {g.dtype for g in gradients} == {torch.float32}
    for mine, want in zip([y, *gradients], [exact, *exact_gradients], strict=True):
        error = (mine.to_dense().double() - want.to_dense()).norm() / want.to_dense().norm()
        assert 0 < error < BFLOAT16_NORM


def largest_allocation(work) -> int:
    """Bytes of the largest single allocation while `work` runs a second time."""
    work()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        work()
    return max(e.nbytes() for e in trace.profiler.kineto_results.events() if e.name() == "[memory]")


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("sparse", [True, False])
def test_forward_and_backward_allocate_nothing_of_the_table_s_size(sparse, autocast):
    n, d = 64**2, 64
    bank = SingletonBank(d, n, sparse_gradients=sparse)
    x, ids, weight = inputs(8, 4, n, d, torch.float32)[:3]

    def work() -> None:
        bank.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            bank(x, SparseRouting.from_topk(ids, weight, n)).float().square().sum().backward()

    # The dense way shows that the measure sees a table: without sparse gradients there is one.
    assert (largest_allocation(work) < n * d * 4 / 3) is sparse


class Products(TorchDispatchMode):
    """Counts products of batches of matrices."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        self.count += operation.name().startswith("aten::bmm")
        return operation(*arguments, **(keywords or {}))


@pytest.mark.parametrize(("device", "count"), [("cpu", 16), ("meta", 1)])
def test_elsewhere_than_on_a_cpu_rows_are_gathered_in_few_calls(device, count):
    table, x = torch.ones(9, 8, device=device), torch.ones(1024, 8, device=device)
    ids = torch.zeros(1024, 16, dtype=torch.int64, device=device)
    with Products() as products:
        assert table_rows.dots(table, ids, x).shape == ids.shape
        assert table_rows.ragged_dots(table, ids[:, 0], x, ids[:, 0]).shape == (1024,)
    assert products.count == count + 1


def test_only_sparse_banks_name_row_parameters():
    assert SingletonBank(4, 9).row_parameters() == ()
    bank = SingletonBank(4, 9, sparse_gradients=True)
    assert [id(p) for p in bank.row_parameters()] == [id(bank.up), id(bank.down)]

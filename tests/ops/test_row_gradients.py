"""Gradients left as factors: the same rows, to the bit, and never in memory as such."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moestro import ops
from moestro.experts import SingletonBank
from moestro.ops import row_gradients
from moestro.ops.row_gradients import collect_factors, forget_factors, pending_factors, row_gradient
from moestro.routing import SparseRouting
from tests.ops.test_singleton_experts import CASES, inputs
from tests.ops.test_singleton_rows import largest_allocation
from tests.tolerances import FLOAT32, FLOAT64


def backward(arguments, factors):
    """Tables after one backward pass, and the gradients of the other inputs."""
    x, ids, weight, up, down = arguments
    leaves = [v.detach().clone().requires_grad_() for v in (x, weight, up, down)]
    if factors:
        collect_factors(leaves[2:])
    y = ops.singleton_experts(leaves[0], ids, *leaves[1:], "gelu", True)
    (y * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return leaves[2:], [leaf.grad for leaf in leaves[:2]]


def whole(gradient):
    return gradient.values(0, len(gradient.ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_factors_stand_for_the_same_rows_to_the_bit(case, dtype):
    arguments = inputs(*CASES[case], dtype)
    (plain, others), (factored, same) = backward(arguments, False), backward(arguments, True)
    assert all(torch.equal(a, b) for a, b in zip(others, same, strict=True))
    for one, other in zip(plain, factored, strict=True):
        values, factors = row_gradient(one), row_gradient(other)
        assert other.grad is None and torch.equal(values.ids, factors.ids)
        assert torch.equal(whole(factors), whole(values))
        pieces = [factors.values(i, min(i + 5, len(factors.ids))) for i in range(0, len(factors.ids), 5)]
        assert torch.equal(torch.cat(pieces) if pieces else whole(factors), whole(values))


def test_norm_and_scaling_are_those_of_the_values(monkeypatch):
    monkeypatch.setattr(row_gradients, "CHUNK", 20)
    (plain, _), (factored, _) = (backward(inputs(*CASES["63 tokens"]), kind) for kind in (False, True))
    for one, other in zip(plain, factored, strict=True):
        values, factors = row_gradient(one), row_gradient(other)
        torch.testing.assert_close(factors.norm(), values.norm(), **FLOAT64)
        for gradient in (values, factors):
            gradient.scale_(torch.tensor(0.3, dtype=torch.float64))
        torch.testing.assert_close(whole(factors), whole(values), **FLOAT64)


def test_passes_add_up_also_with_other_numbers_of_experts():
    """As with several micro-batches, or layers of different k that share their tables."""
    up, down = (torch.randn(50, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    twins = [table.detach().clone().requires_grad_() for table in (up, down)]
    collect_factors([up, down])
    for tokens, k in ((30, 3), (0, 2), (7, 5)):
        x, ids, weight = inputs(tokens, k, 50, 4)[:3]
        for tables in ((up, down), twins):
            ops.singleton_experts(x, ids, weight, *tables, "gelu", True).square().sum().backward()
    for table, twin in zip((up, down), twins, strict=True):
        gradient, want = row_gradient(table), row_gradient(twin)
        assert gradient is row_gradient(table)
        dense = torch.zeros(50, 4, dtype=torch.float64).index_copy_(0, gradient.ids, whole(gradient))
        torch.testing.assert_close(dense, twin.grad.to_dense(), **FLOAT64)
        torch.testing.assert_close(gradient.norm(), want.norm(), **FLOAT64)
        forget_factors(table)
        assert row_gradient(table) is None and pending_factors(table) == []


def test_a_table_used_in_two_ways_is_refused():
    """A bank leaves factors behind, grouped or not; a plain lookup makes a `.grad`."""
    bank = SingletonBank(4, 50, sparse_gradients=True).double()
    collect_factors(bank.parameters())
    x, ids, weight = inputs(30, 3, 50, 4)[:3]
    routing = SparseRouting.from_topk(ids, weight, 50)
    bank(x, routing.grouped()).sum().backward()
    assert row_gradient(bank.up).norm() > 0
    bank(x, routing).sum().backward()
    assert row_gradient(bank.up).norm() > 0
    torch.nn.functional.embedding(ids, bank.up, sparse=True).sum().backward()
    with pytest.raises(ValueError, match=r"a gradient in factors and one in \.grad"):
        row_gradient(bank.up)


def test_no_values_are_written_down():
    """256 tokens of 64 experts each: values would be [n, d] with n near 4096; the factors are [t, d] and [t, k]."""
    sizes = {}
    for factors in (False, True):
        bank = SingletonBank(64, 64**2, sparse_gradients=True)
        x, ids, weight = inputs(256, 64, 64**2, 64, torch.float32)[:3]
        if factors:
            collect_factors(bank.parameters())

        def work(bank=bank, ids=ids, weight=weight, x=x) -> None:
            bank.zero_grad()
            for table in bank.parameters():
                forget_factors(table)
            bank(x, SparseRouting.from_topk(ids, weight, 64**2)).square().sum().backward()

        sizes[factors] = largest_allocation(work)
    values = len(ids.unique()) * 64 * 4
    assert sizes[False] >= values > 3 * sizes[True]


@pytest.mark.parametrize("narrow", [False, True])
def test_experts_of_several_neurons_leave_factors_too(narrow):
    starts = torch.tensor([0, 1, 3, 6, 10, 11])
    x, ids, weight, up, down = inputs(30, 3, 5, 4)
    up, down = (torch.randn(11, 4).to(torch.bfloat16 if narrow else torch.float64) for _ in range(2))
    x, weight = (x.float(), weight.float()) if narrow else (x, weight)
    found = []
    for factors in (False, True):
        tables = [table.clone().requires_grad_() for table in (up, down)]
        if factors:
            collect_factors(tables)
        y = ops.ragged_experts(x, ids, weight, starts, *tables, "gelu", True)
        y.square().sum().backward()
        found.append([y.detach(), *(whole(row_gradient(table)) for table in tables)])
    assert torch.equal(found[0][0], found[1][0])
    for values, factors in zip(found[0][1:], found[1][1:], strict=True):
        assert torch.equal(values, factors.to(values.dtype))
    wide = ops.ragged_experts(x.double(), ids, weight.double(), starts, up.double(), down.double(), "gelu", True)
    torch.testing.assert_close(found[0][0].double(), wide, **(FLOAT32 if narrow else FLOAT64))


def glu(x, ids, weight, tables):
    return ops.singleton_experts(x, ids, weight, tables[0], tables[1], "silu", True, tables[2])


def plain(x, ids, weight, tables):
    return ops.singleton_experts(x, ids, weight, tables[0], tables[1], "gelu", True)


def values(x, ids, weight, tables):
    return x.mean() * ops.value_rows(ids, weight, tables[0], True)


def ragged(x, ids, weight, tables):
    return ops.ragged_experts(x, ids, weight, torch.arange(51), tables[0], tables[1], "gelu", True)


each_operation = pytest.mark.parametrize(("operation", "n_tables"), [(plain, 2), (glu, 3), (values, 1), (ragged, 2)])


def made(n_tables, trainable=True):
    """Float32 inputs, the gates a function of something that is trained, and tables whose factors are collected."""
    generator = torch.Generator().manual_seed(3)
    x, ids = torch.randn(30, 4, generator=generator), torch.randint(50, (30, 3), generator=generator)
    tables = [torch.randn(50, 4, generator=generator).requires_grad_(trainable) for _ in range(n_tables)]
    collect_factors(tables)
    return x.requires_grad_(), ids, torch.rand(30, 3, generator=generator).requires_grad_() * 1.0, tables


@each_operation
def test_scaling_leaves_the_gates_alone(operation, n_tables):
    x, ids, weight, tables = made(n_tables)
    operation(x, ids, weight, tables).sum().backward()
    before, values = weight.detach().clone(), [whole(row_gradient(table)).clone() for table in tables]
    for table, was in zip(tables, values, strict=True):
        row_gradient(table).scale_(torch.tensor(0.25))
        assert torch.equal(whole(row_gradient(table)), 0.25 * was) and was.any()
    assert torch.equal(weight, before)


@each_operation
def test_fixed_tables_leave_nothing(operation, n_tables):
    x, ids, weight, tables = made(n_tables, trainable=False)
    operation(x, ids, weight, tables).sum().backward()
    assert x.grad.any() and all(pending_factors(table) == [] for table in tables)
    tables[-1].requires_grad_()
    operation(x, ids, weight.detach(), tables).sum().backward()
    assert [len(pending_factors(table)) for table in tables] == [0] * (n_tables - 1) + [1]


@each_operation
def test_recomputed_and_moved_saved_tensors_leave_factors_too(operation, n_tables):
    x, ids, weight, tables = made(n_tables)
    operation(x, ids, weight, tables).sum().backward()
    want = [whole(row_gradient(table)).clone() for table in tables]
    for hooked in (True, False):
        for table in tables:
            forget_factors(table)
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone) if hooked else torch.enable_grad():
            made_again = weight.detach() * torch.ones(1, requires_grad=True)
            run = (x, ids, made_again, tables)
            y = operation(*run) if hooked else checkpoint(operation, *run, use_reentrant=False)
        y.sum().backward()
        assert all(table.grad is None for table in tables)
        assert all(torch.equal(whole(row_gradient(t)), was) for t, was in zip(tables, want, strict=True))

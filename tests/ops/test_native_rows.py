"""Rows of tables on compiled kernels: 8 bits a number, experts of several widths, any number of rows a token."""

import re
import subprocess

import pytest
import torch

from moestro.experts import SingletonBank
from moestro.ops import backend, native
from moestro.ops.native import build, table_rows
from moestro.ops.quantized import CODES, QuantizedTable, quantize_rows, quantized_singletons
from moestro.routing import SparseRouting
from tests.ops import test_ragged_experts as ragged
from tests.ops.test_singleton_experts import inputs
from tests.tolerances import BFLOAT16_NORM, FLOAT32

pytestmark = pytest.mark.skipif(native.library().handle is None, reason=f"native kernels {native.status()}")
every_variant = pytest.mark.parametrize("variant", native.variants())
each_storage = pytest.mark.parametrize("storage", list(CODES))
# tokens, k, experts, d
SIZES = {
    "odd": (3, 3, 5, 7),
    "k = 1": (20, 1, 9, 65),
    "many tokens to few experts": (40, 8, 3, 33),
    "more rows than are asked for ahead": (12, 16, 200, 133),
    "no tokens": (0, 4, 9, 8),
}


def singletons(arguments, tables, name: str):
    """Output, and gradients of x and weight, of a gated neuron."""
    x, ids, weight = arguments
    leaves = [v.detach().clone().requires_grad_() for v in (x, weight)]
    with backend.force(name):
        y = quantized_singletons(leaves[0], ids, leaves[1], tables[0], tables[1], "silu", tables[2])
    (y * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return [y.detach(), *(leaf.grad for leaf in leaves)]


@each_storage
@every_variant
@pytest.mark.parametrize("case", SIZES)
def test_tables_in_8_bits_equal_the_definition(case, variant, storage, counted):
    x, ids, weight, up, down = inputs(*SIZES[case], torch.float32)
    tables = [quantize_rows(table, storage) for table in (up * 0.2, down, down * 0.2)]
    wide = [QuantizedTable(table.codes, table.scale.double()) for table in tables]
    want = singletons((x.double(), ids, weight.double()), wide, "fused")
    assert counted == []
    with native.variant(variant):
        have = singletons((x, ids, weight), tables, "native")
    assert set(counted) == {"rows_dot", "rows_sum"}
    for mine, true in zip(have, want, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), true, **FLOAT32)


@each_storage
@every_variant
@pytest.mark.parametrize("d", [1, 16, 37])
def test_every_code_is_the_number_that_torch_reads(d, variant, storage):
    """Numbers too small for a leading bit, both zeros and what is not a number among them."""
    codes = torch.arange(256, dtype=torch.uint8).view(CODES[storage][0])[:, None].expand(256, d).contiguous()
    with native.variant(variant):
        rows = table_rows.weighted_rows(codes, torch.arange(256)[:, None], torch.ones(256, 1))
        first = table_rows.dots(codes, torch.arange(256)[:, None], torch.eye(256, d)[:1].expand(256, d))
    torch.testing.assert_close(rows, codes.float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(first, codes.float()[:, :1], rtol=0, atol=0, equal_nan=True)


@each_storage
def test_threads_change_no_bit_of_rows_in_8_bits(storage, two_threads):
    x, ids, weight, up, down = inputs(90, 7, 64, 40, torch.float32)
    tables = [quantize_rows(table, storage) for table in (up, down, up)]
    many = singletons((x, ids, weight), tables, "native")
    torch.set_num_threads(1)
    one = singletons((x, ids, weight), tables, "native")
    assert all(torch.equal(a, b) for a, b in zip(many, one, strict=True))


def test_in_float64_tables_in_8_bits_take_the_plain_way(counted):
    x, ids, weight, up, down = inputs(9, 4, 5, 17)
    tables = [quantize_rows(table, "int8") for table in (up, down, up)]
    y, *_ = singletons((x, ids, weight), tables, "native")
    assert y.dtype == torch.float64 and counted == []
    # so do codes that kernels do not read, in any of the tables
    tables[2] = QuantizedTable(tables[2].codes.short(), tables[2].scale)
    narrow, *_ = singletons((x.float(), ids, weight.float()), tables, "native")
    assert counted == []
    torch.testing.assert_close(narrow.double(), y, **FLOAT32)


@every_variant
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("case", ragged.CASES)
def test_experts_of_several_widths_equal_the_definition(case, sparse, variant, counted):
    want, want_gradients = ragged.run(ragged.arguments(case), "reference")
    with native.variant(variant):
        have, have_gradients = ragged.run(ragged.arguments(case, torch.float32), "native", sparse=sparse)
    assert set(counted) == {"rows_dot", "rows_sum", "sort_ids", "segment_sums"}
    for mine, true in zip((have, *have_gradients), (want, *want_gradients), strict=True):
        torch.testing.assert_close(mine.to_dense().double(), true, **FLOAT32)


@pytest.mark.parametrize("sparse", [True, False])
def test_experts_of_several_widths_read_tables_in_bfloat16(sparse):
    x, ids, weight, starts, up, down = ragged.arguments("63 tokens", torch.float32)
    made = x, ids, weight, starts, up.bfloat16(), down.bfloat16()
    want, want_gradients = ragged.run([v.double() if v.is_floating_point() else v for v in made], "reference")
    have, have_gradients = ragged.run(made, "native", sparse=sparse)
    torch.testing.assert_close(have.double(), want, **FLOAT32)
    for mine, true in zip(have_gradients, want_gradients, strict=True):
        assert (mine.to_dense().double() - true).norm() <= BFLOAT16_NORM * true.norm()


@every_variant
@pytest.mark.parametrize("sparse", [True, False])
def test_tokens_with_any_number_of_rows_equal_the_definition(sparse, variant, counted):
    """Some tokens have no expert, some the same one twice."""
    token = torch.tensor([4, 1, 1, 1, 6, 0, 4, 1])
    expert = torch.tensor([2, 8, 2, 8, 0, 2, 5, 1])
    found = []
    for name, dtype in (("reference", torch.float64), ("native", torch.float32)):
        torch.manual_seed(0)
        bank = SingletonBank(19, 9, sparse_gradients=sparse).to(dtype)
        x, weight = torch.randn(7, 19), torch.rand(8)
        leaves = [v.to(dtype).requires_grad_() for v in (x, weight)]
        with backend.force(name), native.variant(variant):
            y = bank(leaves[0], SparseRouting(token, expert, leaves[1], 7, 9))
            y.square().sum().backward()
        found.append([y.detach(), *(leaf.grad.to_dense().double() for leaf in (*leaves, bank.up, bank.down))])
    assert set(counted) == {"rows_dot", "rows_sum", "sort_ids", "segment_sums"}
    for have, want in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(have.double(), want.double(), **FLOAT32)


def test_what_kernels_would_misread_is_refused(unchecked_shapes):
    table, ids, x = torch.ones(5, 4), torch.tensor([0, 4]), torch.ones(2, 4)
    token, starts, one = torch.tensor([0, 1]), torch.tensor([0, 1]), torch.ones(2)
    wrong = {
        r"ids from 0 to 5, allowed: 0 to 4, the rows of the table": lambda: table_rows.ragged_dots(
            table, ids + torch.tensor([0, 1]), x, token
        ),
        r"tokens from 1 to 2, allowed: 0 to 1, the rows of x": lambda: table_rows.ragged_dots(table, ids, x, token + 1),
        r"rows_dot: a factor of shape \[2, 3\], allowed: \[2, 4\]": lambda: table_rows.ragged_dots(
            table, ids, x[:, :3], token
        ),
        r"rows_dot: a factor of shape \[1\], allowed: \[2\]": lambda: table_rows.ragged_dots(table, ids, x, token[:1]),
        r"starts from 0 to 3, allowed: 0 to 2, the places of ids": lambda: table_rows.ragged_sums(
            table, ids, one, starts * 3
        ),
        r"starts that fall, allowed: places in ascending order": lambda: table_rows.ragged_sums(
            table, ids, one, starts.flip(0)
        ),
        r"rows_sum: a factor of shape \[4\], allowed: \[5\]": lambda: table_rows.weighted_rows(
            table, ids[:, None], one[:, None], torch.ones(4)
        ),
    }
    for message, call in wrong.items():
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("source", ["table_rows", "row_adamw"])
def test_rows_are_asked_for_ahead_in_what_is_compiled(source, tmp_path):
    """Compilers may take functions that only prefetch for ones without an effect."""
    if len(build.variants(cc := build.compiler())) == 1:
        pytest.skip("prefetch instructions are looked for by their names on x86-64")
    flags = ["-DVARIANT=here", "-S", str(build.FOLDER / f"{source}.c"), "-o", str(tmp_path / "code.s")]
    subprocess.run([cc, *build.FLAGS, *flags], check=True)
    code = (tmp_path / "code.s").read_text()
    for kernel in {"table_rows": ["rows_dot", "rows_sum"], "row_adamw": ["row_adamw"]}[source]:
        body = re.search(rf"^{kernel}_here:(.*?)\.size\s+{kernel}_here", code, re.DOTALL | re.MULTILINE)
        assert body and "prefetch" in body[1], kernel

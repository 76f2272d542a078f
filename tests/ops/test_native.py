"""The compiled kernels: built from these sources, chosen where they apply, and the same on any number of threads."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from moestro import ops
from moestro.ops import backend, native
from moestro.ops.native import build
from moestro.ops.row_gradients import collect_factors, row_gradient
from tests.ops.test_singleton_experts import CASES, inputs
from tests.tolerances import BFLOAT16_NORM, FLOAT32

built = pytest.mark.skipif(native.library().handle is None, reason=f"native kernels {native.status()}")
VARIANTS = native.variants()


@contextmanager
def reloaded() -> Iterator[None]:
    """As in a process that has not looked for the library yet; afterwards as before."""
    native._load.cache_clear()
    try:
        yield
    finally:
        native._load.cache_clear()


def singletons(name: str, arguments, activation="gelu", sparse=False):
    """Output, and gradients of x, weight, up and down."""
    x, ids, weight, up, down = arguments
    leaves = [v.detach().clone().requires_grad_() for v in (x, weight, up, down)]
    with backend.force(name):
        y = ops.singleton_experts(leaves[0], ids, *leaves[1:], activation, sparse)
    (y * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def wide(arguments):
    return [v.double() if v.is_floating_point() else v for v in arguments]


ALL_EQUAL = (9, 4, 5, 17)
MORE = {"odd sizes": (3, 3, 5, 7), "wider than the registers": (5, 9, 30, 133)}


@built
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu", "none"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", [*CASES, *MORE])
def test_singletons_equal_the_definition(case, variant, activation, sparse):
    arguments = inputs(*{**CASES, **MORE}[case], torch.float32)
    want = singletons("reference", wide(arguments), activation)
    with native.variant(variant):
        have = singletons("native", arguments, activation, sparse)
    for mine, true in zip(have, want, strict=True):
        torch.testing.assert_close(mine.to_dense().double(), true, **FLOAT32)


@built
def test_an_input_that_needs_no_gradient_costs_no_rows(monkeypatch):
    kernels, run = [], native.run
    monkeypatch.setattr(native, "run", lambda kernel, *rest: (kernels.append(kernel), run(kernel, *rest)))
    x, ids, *others = inputs(*CASES["63 tokens"], torch.float32)
    found = []
    for needed in (True, False):
        leaves = [v.clone().requires_grad_() for v in others]
        for gate in ((), (torch.ones_like(leaves[1]),)):
            with backend.force("native"):
                y = ops.singleton_experts(x.clone().requires_grad_(needed), ids, *leaves, "silu", False, *gate)
            kernels.clear()
            y.square().sum().backward()
            assert ("rows_sum" in kernels) is needed
        found.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@built
@pytest.mark.parametrize("variant", VARIANTS)
def test_singletons_where_all_ids_are_equal(variant):
    x, _, weight, up, down = inputs(*ALL_EQUAL, torch.float32)
    arguments = (x, torch.full(ALL_EQUAL[:2], 3), weight, up, down)
    with native.variant(variant):
        have = singletons("native", arguments)
    for mine, true in zip(have, singletons("reference", wide(arguments)), strict=True):
        torch.testing.assert_close(mine.double(), true, **FLOAT32)
    assert not have[3][[0, 1, 2, 4]].any() and not have[4][[0, 1, 2, 4]].any()


@built
@pytest.mark.parametrize("sparse", [False, True])
def test_singletons_on_tables_in_bfloat16(sparse):
    x, ids, weight, up, down = inputs(40, 5, 64, 37, torch.float32)
    arguments = (x, ids, weight, up.bfloat16(), down.bfloat16())
    have = singletons("native", arguments, sparse=sparse)
    want = singletons("reference", wide(arguments))
    assert [v.dtype for v in have] == [torch.float32] * 3 + [torch.bfloat16] * 2
    for mine, true, bound in zip(have, want, [FLOAT32["rtol"]] * 3 + [BFLOAT16_NORM] * 2, strict=True):
        assert (mine.to_dense().double() - true).norm() <= bound * true.norm()


@built
@pytest.mark.parametrize("sparse", [False, True])
def test_singletons_are_the_same_to_the_bit_on_two_threads_and_again(sparse, two_threads):
    arguments = inputs(300, 16, 1024, 40, torch.float32)
    runs = [singletons("native", arguments, sparse=sparse) for _ in range(2)]
    torch.set_num_threads(1)
    runs.append(singletons("native", arguments, sparse=sparse))
    for other in runs[1:]:
        for mine, theirs in zip(runs[0], other, strict=True):
            assert torch.equal(mine.to_dense(), theirs.to_dense())


@built
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_norm_of_factors_is_that_of_their_values(variant):
    x, ids, weight, up, down = inputs(40, 5, 64, 37, torch.float32)
    tables = [up.requires_grad_(), down.requires_grad_()]
    collect_factors(tables)
    with native.variant(variant), backend.force("native"):
        ops.singleton_experts(x, ids, weight, *tables, "gelu", True).square().sum().backward()
        for table in tables:
            gradient = row_gradient(table)
            values = gradient.values(0, len(gradient.ids))
            torch.testing.assert_close(gradient.norm().double(), values.double().norm(), **FLOAT32)


@built
def test_ids_outside_the_table_are_refused():
    x, ids, weight, up, down = inputs(2, 2, 5, 4, torch.float32)
    ids[1, 1] = 5
    with backend.force("native"), pytest.raises(ValueError, match="allowed: 0 to 4, the rows of the table"):
        ops.singleton_experts(x, ids, weight, up, down, "gelu")


@built
def test_shapes_and_dtypes_that_kernels_would_misread_are_refused(unchecked_shapes):
    x, ids, weight, up, down = inputs(6, 2, 5, 4, torch.float32)
    wrong = {
        r"rows_dot: a factor of shape \[6, 3\], allowed: \[6, 4\]": (x[:, :3], ids, weight, up, down),
        r"rows_dot: a factor of shape \[5, 4\], allowed: \[6, 4\]": (x[:5], ids, weight, up, down),
        r"ids in torch.float32, allowed: int32, int64": (x, ids.float(), weight, up, down),
    }
    with backend.force("native"):
        for message, arguments in wrong.items():
            with pytest.raises(ValueError, match=message):
                ops.singleton_experts(*arguments, "gelu")
        with pytest.raises(ValueError, match=r"rows_sum: a factor of shape \[5, 2\], allowed: \[6, 2\]"):
            ops.value_rows(ids, weight[:5], up)


@built
def test_ids_in_32_bits_are_widened():
    x, ids, weight, up, down = inputs(6, 2, 5, 4, torch.float32)
    for sparse in (False, True):
        want = singletons("native", (x, ids, weight, up, down), sparse=sparse)
        have = singletons("native", (x, ids.int(), weight, up, down), sparse=sparse)
        for mine, true in zip(have, want, strict=True):
            assert torch.equal(mine.to_dense(), true.to_dense())


@built
def test_only_float32_and_bfloat16_run_on_kernels():
    one = torch.zeros(1)
    assert backend.active() == "native" and backend.runs_native(one, one.bfloat16())
    assert not backend.runs_native(one, one.double()) and not backend.runs_native(one.half())
    with backend.force("fused"):
        assert not backend.runs_native(one)


def test_no_function_of_the_package_is_lost_to_a_module_of_its_name():
    defined = {
        node.name for node in ast.parse((build.FOLDER / "__init__.py").read_text()).body if hasattr(node, "name")
    }
    assert "run" in defined and not defined & {path.stem for path in build.FOLDER.glob("*.py")}


@built
def test_a_tensor_without_plain_memory_is_refused():
    with pytest.raises(ValueError, match="rows_dot: a tensor on cpu with strides .* allowed: contiguous"):
        native.run("rows_dot", [0, 1], torch.zeros(4, 4).T)


@built
def test_an_unknown_variant_is_refused():
    with (
        pytest.raises(ValueError, match="variant='sse9' of the native kernels, allowed: baseline"),
        native.variant("sse9"),
    ):
        pass


@pytest.mark.parametrize(("content", "reason"), [(None, "not built ("), (b"not a library", "cannot be loaded: ")])
def test_everything_works_without_the_library(tmp_path, monkeypatch, content, reason):
    monkeypatch.setattr(build, "LIBRARY", tmp_path / "kernels.so")
    if content:
        build.LIBRARY.write_bytes(content)
    with reloaded():
        status = native.status()
        assert status.startswith(f"not in use: {reason if content is None else build.LIBRARY.name}")
        assert reason in status and "python -m moestro.ops.native.build" in status
        assert backend.active() == "fused" and not backend.runs_native(torch.zeros(1)) and native.variants() == []
        ids, table = torch.zeros(1, 1, dtype=torch.long), torch.ones(3, 4)
        y = ops.singleton_experts(torch.ones(1, 4), ids, torch.ones(1, 1), table, table, "relu")
        assert y.tolist() == [[4.0] * 4]
        with pytest.raises(ValueError, match="backend='native': the compiled kernels are not in use: "):
            backend.force("native").__enter__()
        with pytest.raises(RuntimeError, match="native kernels are not in use: "):
            native.run("rows_dot", [0, 1])


def test_without_a_compiler_the_build_says_so_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build, "LIBRARY", tmp_path / "kernels.so")
    monkeypatch.setenv("CC", str(tmp_path / "no-compiler"))
    assert build.main() == 1
    assert "not built, and not needed" in (said := capsys.readouterr().err) and "no C compiler" in said
    monkeypatch.setenv("CC", "false")
    assert build.main() == 1
    assert not list(tmp_path.iterdir())


@built
def test_a_library_from_other_sources_is_not_loaded(monkeypatch):
    monkeypatch.setattr(build, "fingerprint", lambda: "other")
    with reloaded():
        assert native.status() == "not in use: built from other sources (python -m moestro.ops.native.build)"


@built
@pytest.mark.slow
def test_compiled_graphs_do_not_break_over_the_choice_of_a_backend():
    """In a process without the shape checker (pytorch issue 122093), and as the first thing that asks for a library."""
    code = (
        "import torch; from moestro.ops import backend; "
        "f = torch.compile(lambda x: x + (1 if backend.runs_native(x) else 2), fullgraph=True, backend='eager'); "
        "print(f(torch.zeros(1)).item(), f(torch.zeros(1).double()).item())"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.stdout == "1.0 2.0\n", done.stderr

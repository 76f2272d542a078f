"""Experts in tiles: in bfloat16 against float64, each expert's gradients by themselves; and what holds
in float32 as well, whose accuracy is `test_float32_tiles.py`'s."""

from contextlib import nullcontext

import pytest
import torch

from moestro import ops
from moestro.ops import backend, native
from moestro.ops.native import build, expert_tiles
from moestro.ops.tiled_ffn import tiled_ffn
from tests.tolerances import BFLOAT16_NORM

on_tiles = pytest.mark.usefixtures("tiles")
both = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
# tokens, rows of every expert, widths, width of the model
CASES = {
    "whole tiles": (64, [32, 64], [32, 64], 64),
    "odd everything": (63, [40, 0, 23, 63], [7, 5, 0, 13], 12),
    "every expert its own width": (100, [1, 50, 2, 30, 17], [1, 2, 3, 33, 65], 100),
    "all to one": (100, [0, 0, 200, 0], [8, 16, 24, 40], 33),
    "17 units and rows more than tiles": (90, [49, 81, 33], [49, 47, 31], 130),
    "sums in steps": (70, [290, 33], [40, 9], 545),
    "units in steps": (70, [67, 33, 1], [290, 150, 513], 40),
    "one row": (1, [1], [1], 1),
    "no rows": (5, [0, 0], [4, 6], 20),
    "only width 0": (5, [3, 2], [0, 0], 20),
}


def inputs(n_tokens, counts, widths, d):
    generator = torch.Generator().manual_seed(sum(counts) + sum(widths))

    def draw(*shape):
        return torch.randn(*shape, generator=generator).bfloat16()

    token = torch.randint(n_tokens, (sum(counts),), generator=generator)
    offsets = torch.tensor([0, *counts]).cumsum(0)
    total = sum(widths)
    return draw(n_tokens, d), token, draw(len(token)), offsets, draw(2 * total, d) / d**0.5, draw(total, d), widths


def results(name, dtype, arguments, wanted=(True,) * 4):
    """y and the gradients of x, weight, w_in and w_out, those that are wanted."""
    x, token, weight, offsets, w_in, w_out, widths = arguments
    pairs = zip((x, weight, w_in, w_out), wanted, strict=True)
    leaves = [v.detach().to(dtype).requires_grad_(want) for v, want in pairs]
    with backend.force(name):
        y = ops.expert_ffn(leaves[0], token, leaves[1], offsets, leaves[2], leaves[3], widths, "silu")
    (y * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return [y.detach(), *(leaf.grad for leaf in leaves)]


@on_tiles
@pytest.mark.parametrize("case", CASES)
def test_each_experts_results_equal_float64(case, counted):
    arguments = inputs(*CASES[case])
    *_, offsets, _, _, widths = arguments
    have, want = results("native", torch.bfloat16, arguments), results("reference", torch.float64, arguments)
    assert counted.count("tile_whole") == 2 and all(v.dtype == torch.bfloat16 for v in have)
    rows, units = offsets.diff().tolist(), list(widths)
    parts = [[len(have[0])], [len(have[1])], rows, [2 * w for w in units], units]
    for index, (mine, true, sizes) in enumerate(zip(have, want, parts, strict=True)):
        for e, (a, b) in enumerate(zip(mine.double().split(sizes), true.split(sizes), strict=True)):
            assert (a - b).norm() <= BFLOAT16_NORM * b.norm(), (index, e)


@on_tiles
@both
def test_what_is_not_an_experts_own_is_not_read(dtype):
    x, token, weight, offsets, w_in, w_out, widths = inputs(*CASES["every expert its own width"])
    counts = [0, *offsets.diff().tolist(), 0]
    token = token.clamp(max=98)
    want = results("native", dtype, (x, token, weight, offsets, w_in, w_out, widths))
    around = [torch.full((n, x.shape[1]), float("nan")).bfloat16() for n in (6, 3)]
    x[99] = float("nan")
    padded_in, padded_out = (torch.cat([a, v, a]) for a, v in zip(around, (w_in, w_out), strict=True))
    bounds = torch.tensor([0, *counts]).cumsum(0)
    have = results("native", dtype, (x, token, weight, bounds, padded_in, padded_out, [3, *widths, 3]))
    for index, (mine, true) in enumerate(zip(have, want, strict=True)):
        own = mine[len(mine) - len(true) >> 1 :][: len(true)]
        assert torch.equal(own[:99] if index < 2 else own, true[:99] if index < 2 else true), index
        assert mine.isfinite().all()


@on_tiles
@both
def test_threads_and_calls_change_no_bit(dtype, two_threads):
    arguments = inputs(*CASES["17 units and rows more than tiles"])
    runs = [results("native", dtype, arguments) for _ in range(2)]
    torch.set_num_threads(1)
    runs.append(results("native", dtype, arguments))
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


@on_tiles
def test_gates_of_any_size_and_what_is_not_a_number():
    gates = torch.tensor([-1e30, -200.0, -88.0, -20.0, 0.0, 20.0, 88.0, 200.0, 1e30, float("nan")]).bfloat16()
    w_in = torch.zeros(4, 2).bfloat16()
    w_in[0, 0], w_in[2, 1] = 1, 1
    x = torch.stack([gates, torch.ones_like(gates)], 1)
    token, offsets = torch.arange(len(gates)), torch.tensor([0, len(gates)])
    arguments = x, token, torch.ones(len(gates)), offsets, w_in, torch.eye(2).bfloat16(), [2]
    have, want = results("native", torch.bfloat16, arguments), results("reference", torch.float64, arguments)
    for mine, true in zip(have[:2], want[:2], strict=True):
        assert mine[-1].isnan().any() and mine[:-1].isfinite().all()
        assert torch.allclose(mine[:-1].double(), true[:-1], rtol=2**-7, atol=1e-6)


def forced(monkeypatch, shared):
    """Let all cores share these experts, and others be one core's each."""
    either = lambda costs, threads: (list(shared), [e for e in range(len(costs)) if e not in shared])  # noqa: E731
    monkeypatch.setattr(expert_tiles, "_shared_and_whole", either)


@on_tiles
@both
@pytest.mark.parametrize("shared", [(), (0,), (1, 2, 5), (0, 1, 2, 3, 4, 5)])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_experts_of_one_core_and_of_all_have_the_same_bits(dtype, shared, threads, counted, monkeypatch, two_threads):
    arguments = inputs(300, [50, 0, 140, 90, 20, 33], [33, 40, 20, 64, 0, 7], 70)
    want = results("native", dtype, arguments)
    counted.clear()
    torch.set_num_threads(threads)
    forced(monkeypatch, shared)
    have = results("native", dtype, arguments)
    assert counted.count("tile_gradients") == len(shared) and counted.count("tile_whole") == 2
    assert all(torch.equal(a, b) for a, b in zip(have, want, strict=True))


def test_cores_share_experts_that_would_keep_the_others_waiting():
    split = expert_tiles._shared_and_whole
    assert split([3, 1, 2], 1) == ([], [0, 2, 1])
    assert split([5, 5, 5, 5], 2) == ([], [0, 1, 2, 3])
    assert split([1, 100, 2], 2) == ([1], [2, 0])
    assert split([7], 4) == ([0], []) and split([], 3) == ([], [])
    assert split([9, 10, 1, 1, 1, 1], 8) == ([0, 1], [2, 3, 4, 5])


@on_tiles
@both
@pytest.mark.parametrize("wanted", range(4))
def test_gradients_that_nobody_wants_are_not_computed(dtype, wanted, counted, monkeypatch):
    arguments = inputs(*CASES["odd everything"])
    every = results("native", dtype, arguments)
    alone = [i == wanted for i in range(4)]
    have = results("native", dtype, arguments, alone)
    assert [v is None for v in have[1:]] == [i != wanted for i in range(4)]
    assert torch.equal(have[1 + wanted], every[1 + wanted])
    assert counted.count("tile_sum") == (4 if wanted == 0 else 3)
    counted.clear()
    forced(monkeypatch, range(4))
    shared = results("native", dtype, arguments, alone)
    assert torch.equal(have[1 + wanted], shared[1 + wanted])
    assert counted.count("tile_rows") == (8 if wanted == 0 else 4)


@on_tiles
@both
def test_without_gradients_outputs_are_the_same_bits_and_backward_may_run_twice(dtype, counted):
    many = (300, [150, 0, 133], [40, 5, 33], 70)
    x, token, weight, offsets, w_in, w_out, widths = inputs(*many)
    x, weight, w_in, w_out = (v.to(dtype) for v in (x, weight, w_in, w_out))
    want = results("native", dtype, (x, token, weight, offsets, w_in, w_out, widths))
    with torch.no_grad():
        assert torch.equal(ops.expert_ffn(x, token, weight, offsets, w_in, w_out, widths, "silu"), want[0])
    assert "few_rows" not in counted
    y = ops.expert_ffn(x.requires_grad_(), token, weight, offsets, w_in.requires_grad_(), w_out, widths, "silu")
    first, second = (torch.autograd.grad(y.float().square().sum(), [x, w_in], retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("why", ["another variant", "another activation", "no gate", "stacked"])
def test_everything_else_runs_without_tiles(why, counted, tiles):
    x, token, weight, offsets, w_in, w_out, widths = inputs(*CASES["whole tiles"])
    activation, kernels = "silu", nullcontext()
    if why == "another activation":
        activation = "gelu"
    elif why == "no gate":
        w_in = w_in[: len(w_out)]
    elif why == "stacked":
        widths, w_out = [48, 48], torch.zeros(2, 64, 48).bfloat16()
    elif why == "another variant":
        kernels = native.variant("avx2")
    with kernels:
        y = ops.expert_ffn(x, token, weight, offsets, w_in.requires_grad_(), w_out, widths, activation)
        (gradient,) = torch.autograd.grad(y.float().sum(), [w_in])
    assert not any(name.startswith("tile") for name in counted) and gradient.isfinite().all()


def test_what_does_not_go_together_is_refused(unchecked_shapes):
    x, token, weight, offsets, w_in, w_out, widths = inputs(*CASES["whole tiles"])
    bounds = offsets.tolist()
    for said, changed in (
        (r"w_out \[95, 64\], allowed: those of 96 units", (x, token, weight, w_in, w_out[1:])),
        ("96 tokens, 95 weights, allowed: 96 of both", (x, token, weight[1:], w_in, w_out)),
        ("allowed: 0 to 63", (x, token + 64, weight, w_in, w_out)),
    ):
        with pytest.raises(ValueError, match=said):
            tiled_ffn(*changed, bounds, widths, False)


def test_a_compiler_that_does_not_know_a_processor_builds_the_rest(tmp_path):
    old = tmp_path / "old-compiler"
    old.write_text('#!/bin/sh\ncase "$*" in *-mamx*) exit 1;; esac\n')
    old.chmod(0o755)
    known = build.variants(str(old))
    assert "baseline" in known and "amx" not in known
    assert set(build.variants(str(tmp_path / "none"))) == {"baseline"}

"""Experts in float32 in tiles: as exact as torch's own products, whatever the numbers."""

import pytest
import torch

from moestro import ops
from moestro.ops.native import expert_tiles
from tests.ops.test_native_tiles import CASES, results

on_tiles = pytest.mark.usefixtures("tiles")
# what single experts and rows may be off, beside twice the error of torch's products: eight roundings of float32,
# because of few numbers torch's error is now and then nearly 0
ROUNDINGS = 8 * 2**-23
LARGER = CASES | {
    "wide experts": (200, [150, 90], [300, 600], 96),
    "more units than are taken together": (64, [40, 33], [1100, 530], 70),
    "many rows": (700, [600, 10], [64, 96], 160),
}


def inputs(n_tokens, counts, widths, d):
    generator = torch.Generator().manual_seed(sum(counts) + sum(widths))

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    token = torch.randint(n_tokens, (sum(counts),), generator=generator)
    offsets = torch.tensor([0, *counts]).cumsum(0)
    total = sum(widths)
    return draw(n_tokens, d), token, draw(len(token)), offsets, draw(2 * total, d) / d**0.5, draw(total, d), widths


def as_exact(arguments, parts):
    """y and each gradient have at most twice the error of torch's products, beside float64, and so has each part."""
    want = results("reference", torch.float64, arguments)
    ours, theirs = (results(name, torch.float32, arguments) for name in ("native", "fused"))
    for index, (a, b, true, sizes) in enumerate(zip(ours, theirs, want, parts, strict=True)):
        if true.ndim == 1 and len(sizes) == len(true):  # single numbers, each with an error by chance
            mine, other = (((v - true) / true).abs().median() for v in (a, b))
            assert mine <= 2 * other, index
            continue
        assert (a - true).norm() <= 2 * (b - true).norm(), index
        for e, (mine, other, exact) in enumerate(zip(*(v.double().split(sizes) for v in (a, b, true)), strict=True)):
            most = 2 * (other - exact).norm() + ROUNDINGS * exact.norm()
            assert (mine - exact).norm() <= most, (index, e, (mine - exact).norm() / exact.norm())


@on_tiles
@pytest.mark.parametrize("case", LARGER)
def test_each_experts_results_are_as_exact_as_products_of_torch(case, counted):
    arguments = inputs(*LARGER[case])
    x, _, _, offsets, _, _, widths = arguments
    as_exact(arguments, [[len(x)], [len(x)], offsets.diff().tolist(), [2 * w for w in widths], list(widths)])
    assert counted.count("tile_whole") == 2


@on_tiles
def test_rows_of_very_different_sizes_are_exact_each():
    n = 61
    x, _, weight, offsets, w_in, w_out, widths = inputs(n, [n], [70], 50)
    x = x * torch.logspace(-15, 15, n)[:, None]
    arguments = x, torch.arange(n), weight, offsets, w_in, w_out, widths
    as_exact(arguments, [[1] * n, [1] * n, [1] * n, [140], [70]])


@on_tiles
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, 0x7F800001, -1, -0x7FFFFF, 0x7F800000])
def test_what_is_not_a_number_stays_so(bits, precision, matmul_precision):
    torch.set_float32_matmul_precision(precision)
    x, token, weight, offsets, w_in, w_out, widths = inputs(*CASES["every expert its own width"])
    wrong = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    hit = x.clone()
    hit[token[0], 7] = wrong[0]
    y, dx, *_ = results("native", torch.float32, (hit, token, weight, offsets, w_in, w_out, widths))
    for result in (y, dx):
        others = torch.arange(len(x)) != token[0]
        assert not result[token[0]].isfinite().any() and result[others].isfinite().all()
    for index in (4, 5):
        weights = [w_in.clone(), w_out.clone()]
        weights[index - 4][-1, 3] = wrong[0]
        y = results("native", torch.float32, (x, token, weight, offsets, *weights, widths))[0]
        served = torch.zeros(len(x), dtype=torch.bool)
        served[token[offsets[-2] :]] = True
        assert not y[served][:, 3].isfinite().any() and y[~served].isfinite().all()


@on_tiles
def test_numbers_without_a_leading_bit_are_zero_at_worst():
    x, token, weight, offsets, w_in, w_out, widths = inputs(*CASES["odd everything"])
    for size in (1e-37, 1e-39, 1e-42):
        have = results("native", torch.float32, (x * size, token, weight, offsets, w_in, w_out / 1e-20, widths))
        want = results("reference", torch.float64, (x * size, token, weight, offsets, w_in, w_out / 1e-20, widths))
        assert all(v.isfinite().all() for v in have)
        # what the second projection makes of a hidden number that is 0
        assert (have[0] - want[0]).abs().max() <= 1e20 * 2**-120


@pytest.fixture
def matmul_precision():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_torchs_precision_says_what_numbers_are_multiplied_in(precision, tiles, matmul_precision):
    arguments = inputs(*CASES["17 units and rows more than tiles"])
    want = results("reference", torch.float64, arguments)
    torch.set_float32_matmul_precision(precision)
    have = results("native", torch.float32, arguments)
    pieces = expert_tiles.PIECES[tiles][precision]
    whole = pieces == 3 or pieces == 2 and tiles != "amx"
    least, most = (0, 1e-6) if whole else (1e-6, 5e-5) if pieces == 2 else (1e-3, 2e-2)
    for mine, true in zip(have, want, strict=True):
        assert least <= (mine - true).norm() / true.norm() <= most


@on_tiles
def test_gates_of_any_size():
    gates = torch.tensor([-1e30, -200.0, -88.0, -20.0, -1e-3, 0.0, 1e-30, 20.0, 88.0, 200.0, 1e30])
    w_in = torch.zeros(4, 2)
    w_in[0, 0], w_in[2, 1] = 1, 1
    x = torch.stack([gates, torch.ones_like(gates)], 1)
    token, offsets = torch.arange(len(gates)), torch.tensor([0, len(gates)])
    arguments = x, token, torch.ones(len(gates)), offsets, w_in, torch.eye(2), [2]
    have, want = results("native", torch.float32, arguments), results("reference", torch.float64, arguments)
    for mine, true in zip(have[:2], want[:2], strict=True):
        assert torch.allclose(mine.double(), true, rtol=1e-6, atol=1e-34)


@on_tiles
def test_memory_kept_for_the_backward_pass_is_x_and_the_pre_activations():
    x, token, weight, offsets, w_in, w_out, widths = inputs(*LARGER["wide experts"])
    saved = []
    leaves = [v.requires_grad_() for v in (x, weight, w_in, w_out)]
    own = {v.data_ptr() for v in leaves}
    with torch.autograd.graph.saved_tensors_hooks(lambda v: saved.append(v) or v, lambda v: v):
        ops.expert_ffn(x, token, weight, offsets, w_in, w_out, widths, "silu")
    assert sum(v.numel() for v in saved if v.data_ptr() not in own) == 2 * (160 * 320 + 96 * 608)

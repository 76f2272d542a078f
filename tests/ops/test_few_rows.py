"""Experts of few rows in any order, without sorting, against the definition."""

import pytest
import torch

from moestro import FFNBank, LinearScore, MoELayer, ScoredRouter, TopK, ops
from moestro.ops import backend
from moestro.ops.backend import TritonOptions
from moestro.routing import SparseRouting
from tests.ops.triton_cases import DEVICE, why_not
from tests.tolerances import BFLOAT16_NORM, FLOAT16_NORM, FLOAT32_NORM, FLOAT64

needs_triton = pytest.mark.skipif(bool(why_not()), reason=why_not())
FEW = TritonOptions(few_rows=True)
# tokens of the rows, experts of the rows, number of tokens, widths
CASES = {
    "one row": ([0], [0], 1, [1]),
    "a token with three experts": ([0, 0, 0], [2, 0, 1], 1, [40, 33, 17]),
    "several tokens, any order, one without rows": ([3, 0, 1, 0, 3], [1, 3, 3, 0, 2], 4, [7, 0, 9, 37]),
    "all rows to one": ([1, 0, 2], [1, 1, 1], 3, [5, 37, 9]),
    "no rows": ([], [], 3, [4, 6]),
    "only experts of width 0": ([0, 1], [1, 0], 2, [0, 0]),
}


def problem(case: str, gates: int, dtype: torch.dtype, d: int = 19):
    token, expert, n_tokens, widths = CASES[case]
    generator = torch.Generator().manual_seed(len(case))

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    pair = (torch.tensor(v, dtype=torch.int64, device=DEVICE) for v in (token, expert))
    total = sum(widths)
    return draw(n_tokens, d), *pair, draw(len(token)), draw(gates * total, d) / d**0.5, draw(total, d), widths


def defined(x, token, expert, weight, w_in, w_out, widths, activation):
    """The definition in float64, on sorted rows."""
    r = SparseRouting(token, expert, weight.double(), len(x), len(widths)).grouped()
    with backend.force("reference"):
        return ops.expert_ffn(
            x.double(), r.token, r.weight, r.offsets, w_in.double(), w_out.double(), widths, activation
        )


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu", "none"])
@pytest.mark.parametrize("gates", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_definition_in_float64(case, gates, activation):
    p = problem(case, gates, torch.float64)
    with backend.force("fused"):
        torch.testing.assert_close(ops.few_rows_ffn(*p, activation), defined(*p, activation), **FLOAT64)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, FLOAT32_NORM), (torch.bfloat16, BFLOAT16_NORM)])
def test_smaller_numbers_are_close(dtype, tolerance):
    p = problem("several tokens, any order, one without rows", 2, dtype)
    have, want = ops.few_rows_ffn(*p, "silu"), defined(*p, "silu")
    assert have.dtype == dtype and (have.double() - want).norm() <= tolerance * want.norm()


@needs_triton
@pytest.mark.parametrize("gates", [1, 2])
@pytest.mark.parametrize(
    ("case", "activation"),
    [(case, "silu") for case in CASES] + [("a token with three experts", name) for name in ("gelu", "relu", "none")],
)
def test_triton_equals_the_definition(case, activation, gates):
    p = problem(case, gates, torch.float32)
    with backend.force("triton", FEW):
        have = ops.few_rows_ffn(*p, activation)
    want = defined(*p, activation)
    assert (have.double() - want).norm() <= FLOAT32_NORM * want.norm()


@needs_triton
def test_triton_in_float16_and_under_autocast():
    p = problem("several tokens, any order, one without rows", 2, torch.float16)
    wide = [v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in p]
    want = defined(*p, "silu")
    with backend.force("triton", FEW):
        have = ops.few_rows_ffn(*p, "silu")
        with torch.autocast(DEVICE, dtype=torch.float16):
            lowered = ops.few_rows_ffn(*wide, "silu")
    assert have.dtype == lowered.dtype == torch.float16
    assert (have.double() - want).norm() <= FLOAT16_NORM * want.norm() and torch.equal(have, lowered)


@needs_triton
def test_triton_reads_nothing_of_other_experts_or_tokens():
    p = problem("a token with three experts", 2, torch.float32)
    x, token, expert, weight, w_in, w_out, widths = p
    with backend.force("triton", FEW):
        clean = ops.few_rows_ffn(*p, "silu")
        more = torch.cat([x, torch.full_like(x, float("nan"))])
        padded_in, padded_out = (torch.cat([w, torch.full_like(w[:9], float("nan"))]) for w in (w_in, w_out))
        padded_in = torch.cat([padded_in, torch.full_like(w_in[:9], float("nan"))])
        have = ops.few_rows_ffn(more, token, expert, weight, padded_in, padded_out, [*widths, 9], "silu")
    torch.testing.assert_close(have[:1], clean, rtol=0, atol=0)
    assert not have[1].any()


def layer(top_k: int = 2, n_experts: int = 33) -> MoELayer:
    torch.manual_seed(0)
    bank = FFNBank(20, [(5 * e) % 21 + 1 for e in range(n_experts)])
    return MoELayer(ScoredRouter(LinearScore(20, n_experts, 1.0), TopK(top_k)), [bank]).to(DEVICE)


@pytest.mark.parametrize("name", ["fused", pytest.param("triton", marks=needs_triton)])
def test_a_layer_decodes_without_sorting_and_trains_with(name, monkeypatch):
    moe = layer()
    x = torch.randn(1, 20, device=DEVICE)
    with backend.force("reference"):
        want = moe(x)[0]

    def sorts(self):
        raise AssertionError("sorted")

    monkeypatch.setattr(SparseRouting, "grouped", sorts)
    with backend.force(name, FEW):
        with torch.no_grad():
            have = moe(x)[0]
        with pytest.raises(AssertionError, match="sorted"):
            moe(x)
        with torch.no_grad(), pytest.raises(AssertionError, match="sorted"):
            moe(torch.randn(9, 20, device=DEVICE))
    torch.testing.assert_close(have, want.detach(), rtol=1e-4, atol=1e-6)


@needs_triton
def test_triton_has_to_be_asked_for_it():
    x = torch.randn(1, 20)
    with torch.no_grad(), backend.force("triton", TritonOptions()):
        assert not ops.skips_sorting(1, 1, 100, x)
    with torch.no_grad(), backend.force("triton", FEW):
        assert ops.skips_sorting(25, 25, 100, x) and not ops.skips_sorting(26, 26, 100, x)
    with backend.force("triton", FEW):
        assert not ops.skips_sorting(1, 1, 100, x.requires_grad_())
    with torch.no_grad(), backend.force("reference"):
        assert not ops.skips_sorting(1, 1, 100, x)

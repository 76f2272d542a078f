"""HMoE's widths, parameters and FLOPs (check 10 of the list in test_hmoe.py)."""

from typing import Literal

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moestro.experts import FFNBank
from moestro.experts.widths import arithmetic, equal, from_ratios, geometric, hybrid
from moestro.layers import DenseFFN, MoELayer
from moestro.model import Attention, Block, Transformer
from moestro.ops import backend
from moestro.routers import LinearScore, ScoredRouter, TopK, TopP
from moestro.routing import SparseRouting, Trace
from tests.reference import hmoe
from tests.systems.hmoe_layers import make_layer, random

VOCAB = 32_000


@pytest.mark.parametrize(("total", "multiple_of"), [(12_288, 1), (12_288, 96), (512, 4), (1000, 1), (1000, 8)])
def test_widths_are_the_papers_ratios_and_keep_their_sum(total: int, multiple_of: int) -> None:
    for ours, ratios in (
        (arithmetic(8, total, multiple_of), hmoe.ARITHMETIC),
        (geometric(8, total, multiple_of), hmoe.GEOMETRIC),
        (hybrid(8, total, multiple_of), hmoe.HYBRID),
        (equal(8, total, multiple_of), (1,) * 8),
    ):
        assert ours == hmoe.widths_from_ratios(ratios, total, multiple_of)
        assert sum(ours) == total and all(width % multiple_of == 0 for width in ours)


def test_widths_of_the_papers_models() -> None:
    assert arithmetic(8, 12_288) == [864, 1056, 1248, 1440, 1632, 1824, 2016, 2208]
    assert arithmetic(8, 32_768) == [2304, 2816, 3328, 3840, 4352, 4864, 5376, 5888]
    assert hybrid(8, 12_288) == [768, 768, 768, 768, 1536, 1536, 3072, 3072]
    assert equal(8, 12_288) == [1536] * 8
    assert round(hmoe.harmonic_over_arithmetic(arithmetic(8, 12_288)), 3) == 0.912


def test_impossible_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="total=100 is not a positive multiple of multiple_of=8"):
        arithmetic(8, 100, 8)
    with pytest.raises(ValueError, match="all above 0"):
        from_ratios([1, 0, 2], 30)
    with pytest.raises(ValueError, match="n_experts=6, allowed for hybrid widths: a multiple of 4"):
        hybrid(6, 60)
    with pytest.raises(ValueError, match=r"widths=\[3, -1\], allowed"):
        FFNBank(4, [3, -1])


@pytest.mark.parametrize("widths", [[1, 3, 4, 5, 8], [7] * 4, [0, 5]])
def test_layer_parameters(widths: list[int]) -> None:
    """sum_i 3 d h_i + N d, exactly."""
    layer = make_layer(widths, TopK(1))
    assert sum(parameter.numel() for parameter in layer.parameters()) == hmoe.layer_parameters(6, widths)


def model(d_model: int, n_heads: int, ffn: int, widths: list[int] | None = None) -> Transformer:
    def layer() -> DenseFFN | MoELayer:
        if widths is None:
            return DenseFFN(d_model, ffn)
        return MoELayer(ScoredRouter(LinearScore(d_model, 8), TopK(2)), [FFNBank(d_model, widths)])

    with torch.device("meta"):
        blocks = [Block(d_model, Attention(d_model, n_heads), layer()) for _ in range(12)]
        return Transformer(VOCAB, d_model, blocks)


@pytest.mark.parametrize(
    ("d_model", "n_heads", "ffn", "millions"), [(768, 12, 12_288, 417.2), (1024, 16, 32_768, 1323.9)]
)
def test_dense_twins(d_model: int, n_heads: int, ffn: int, millions: float) -> None:
    """The paper's 417M and 1.32B."""
    total = sum(parameter.numel() for parameter in model(d_model, n_heads, ffn).parameters())
    assert total == hmoe.model_parameters(VOCAB, d_model, 12, d_model, 3 * d_model * ffn)
    assert round(total / 1e6, 1) == millions


def test_active_parameters_of_the_papers_mixture() -> None:
    """Evenly routed top-2 of 8: 162.5M active (the paper's 163M), router and norms counted."""
    mixture = model(768, 12, 0, arithmetic(8, 12_288))
    expert = torch.tensor([[i, (i + 1) % 8] for i in range(8)])
    even = SparseRouting.from_topk(expert, torch.full((8, 2), 0.5), 8)
    traces = [Trace(layer, torch.zeros(8, 768), even) for layer in mixture.moe_layers().values()]
    active = float(mixture.active_parameters(traces))
    assert active == hmoe.model_parameters(VOCAB, 768, 12, 768, 3 * 768 * 3072 + 8 * 768)
    assert round(active / 1e6, 1) == 162.5


@pytest.mark.parametrize("how", ["fused", "reference"])
def test_flops_equal_a_counter(how: str) -> None:
    """Of the widths that were used, not of configured k: Top-P on unequal experts."""
    layer = make_layer([1, 3, 4, 5, 8], TopP(0.6))
    x = random(30, 6)
    with backend.force(how), FlopCounterMode(display=False) as counter:
        _, (trace,) = layer(x)
    router = 2 * 30 * 5 * 6
    assert layer.flops(trace.routing).item().useful == router + 6 * 6 * float(trace.active_width().sum())
    assert layer.flops(trace.routing).item().useful == counter.get_total_flops()


def test_expected_flops_are_those_of_even_routing() -> None:
    layer = make_layer([1, 3, 4, 5, 8], TopK(2))
    assert layer.expected_token_flops() == 2 * 5 * 6 + 2 * (6 * 6 * 21 / 5)


@pytest.mark.parametrize(("out_init", "scale_of"), [("per_width", [200, 800, 3200]), ("shared", [1400] * 3)])
def test_each_expert_starts_like_a_dense_layer(out_init: Literal["per_width", "shared"], scale_of: list[int]) -> None:
    """Standard deviation of W_o: h_i^-0.5 of the expert's own width, or of the mean width; of W_g and W_p: d^-0.5."""
    bank = FFNBank(64, [200, 800, 3200], out_init=out_init)
    for inner, outer, width in zip(bank.w_in.matrices(), bank.w_out.matrices(), scale_of, strict=True):
        assert abs(float(outer.detach().std()) * width**0.5 - 1) < 0.03
        assert abs(float(inner.detach().std()) * 64**0.5 - 1) < 0.03

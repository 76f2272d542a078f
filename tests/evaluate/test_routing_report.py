"""Routing figures against hand-made routings and against a count token by token."""

import math

import numpy as np
import pytest
import torch

from moestro import DenseFFN, FFNBank, LinearScore, MoELayer, ProductKeyRouter, ScoredRouter, SingletonBank, Soft, TopP
from moestro.evaluate import routing_report
from moestro.evaluate.routing_report import LayerUsage, histogram, spread, unevenness
from moestro.model import Attention, Block, Transformer
from moestro.routing import SoftRouting, SparseRouting, Trace
from tests.evaluate.test_perplexity import padded, ready_model
from tests.train.tiny import VOCABULARY, WIDTH, Counting, moe


def test_even_gates_have_no_unevenness_and_a_single_expert_log_n():
    assert unevenness(torch.full((8,), 0.3)) == pytest.approx(0.0, abs=1e-12)
    assert unevenness(torch.tensor([0.0, 5.0, 0.0, 0.0])) == pytest.approx(math.log(4), rel=1e-12)
    expected = math.log(3) + 0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25)
    assert unevenness(torch.tensor([2.0, 1.0, 1.0])) == pytest.approx(expected, rel=1e-12)


def routing(expert: list[int], weight: list[float], token: list[int], n_tokens: int) -> SparseRouting:
    return SparseRouting(torch.tensor(token), torch.tensor(expert), torch.tensor(weight), n_tokens, 3)


def test_unevenness_counts_gates_and_load_counts_rows():
    layer = moe()
    usage = LayerUsage(layer)
    # Expert 0 gets one row of gate 0.9, expert 1 three rows of 0.1 each, expert 2 nothing; token 3 has no expert.
    usage.add(Trace(layer, torch.zeros(2, WIDTH), routing([0, 1], [0.9, 0.1], [0, 0], 2)))
    usage.add(Trace(layer, torch.zeros(2, WIDTH), routing([1, 1], [0.1, 0.1], [0, 0], 2)))
    figures = usage.figures()
    assert figures["load"] == [1, 3, 0]
    assert figures["widths"] == [2, 4, 6]
    assert (figures["n_experts"], figures["tokens"], figures["load_histogram"]) == (3, 4, None)
    assert figures["usage"] == figures["dead"] * 2 == pytest.approx(2 / 3)
    expected = math.log(3) + 0.75 * math.log(0.75) + 0.25 * math.log(0.25)
    assert figures["unevenness"] == pytest.approx(expected, rel=1e-6)
    assert figures["experts_per_token"] == {"mean": 1.0, "p50": 1.0, "p99": pytest.approx(2.0)}
    assert figures["active_width"]["mean"] == pytest.approx((2 + 4 + 4 + 4) / 4)


def test_an_expert_with_rows_but_no_gate_is_neither_used_nor_dead():
    layer = moe()
    usage = LayerUsage(layer)
    usage.add(Trace(layer, torch.zeros(1, WIDTH), routing([0, 1], [1.0, 0.0], [0, 0], 1)))
    figures = usage.figures()
    assert (figures["usage"], figures["dead"]) == (pytest.approx(1 / 3), pytest.approx(1 / 3))


def test_load_and_importance_equal_those_of_the_dense_matrix():
    layer = moe()
    trace = layer(torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(0)))[1][0]
    dense = trace.routing.dense()
    torch.testing.assert_close(trace.routing.importance(), dense.sum(0))
    assert torch.equal(trace.routing.load(), (dense > 0).sum(0).float())
    soft = SoftRouting((dense + 0.1,))
    assert soft.load().tolist() == [20.0] * 3
    torch.testing.assert_close(soft.importance(), (dense + 0.1).sum(0))


def model_of(*layers) -> Transformer:
    return Transformer(VOCABULARY, WIDTH, [Block(WIDTH, Attention(WIDTH, 2), layer) for layer in layers])


def test_the_report_counts_every_layer_over_all_batches():
    torch.manual_seed(0)
    adaptive = MoELayer(ScoredRouter(LinearScore(WIDTH, 4, init_std=1.0), TopP(0.7)), [FFNBank(WIDTH, [2, 2, 4, 8])])
    everyone = MoELayer(ScoredRouter(LinearScore(WIDTH, 2), Soft()), [FFNBank(WIDTH, [3, 5])])
    model = model_of(adaptive, DenseFFN(WIDTH, 4), everyone)
    batches = [Counting().train_batch(0, 4, 0), Counting().train_batch(1, 2, 0)]
    report = routing_report(model, batches)
    assert list(report) == ["blocks.0.ffn", "blocks.2.ffn"]
    model.eval()
    counts = np.concatenate([used(model, batch) for batch in batches])
    first = report["blocks.0.ffn"]
    assert first["tokens"] == len(counts) == 36
    assert first["load"] == counts.sum(0).tolist()
    assert first["experts_per_token"]["mean"] == pytest.approx(counts.sum(1).mean())
    assert first["active_width"]["p99"] == pytest.approx(np.percentile(counts @ [2, 2, 4, 8], 99))
    assert report["blocks.2.ffn"]["load"] == [36, 36]
    assert report["blocks.2.ffn"]["active_width"] == {"mean": 8.0, "p50": 8.0, "p99": 8.0}


def used(model: Transformer, batch) -> np.ndarray:
    """1 where a token of the batch uses an expert of the first block."""
    trace = model(batch.tokens, documents=batch.documents).traces[0]
    return (trace.routing.dense() > 0).int().numpy()


def test_padding_is_not_counted():
    batch = padded(Counting().train_batch(0, 3, 0))
    report = routing_report(ready_model(), [batch])
    assert [figures["tokens"] for figures in report.values()] == [int(batch.keep.sum())] * 2 == [14, 14]
    assert sum(report["blocks.0.ffn"]["load"]) == 2 * 14


def test_a_layer_of_very_many_experts_gets_a_histogram():
    torch.manual_seed(0)
    router = ProductKeyRouter(WIDTH, 128 * 128, heads=2, top_k=4, d_key=4, query_norm="none")
    model = model_of(MoELayer(router, [SingletonBank(WIDTH, 128 * 128)]))
    figures = routing_report(model, [Counting().train_batch(0, 4, 0)])["blocks.0.ffn"]
    assert (figures["load"], figures["widths"]) == (None, None)
    bins = figures["load_histogram"]
    assert sum(bins["experts"]) == figures["n_experts"] == 128 * 128
    assert figures["dead"] == bins["experts"][0] / 128**2
    assert figures["usage"] == pytest.approx(1 - figures["dead"])
    assert figures["experts_per_token"] == figures["active_width"] == {"mean": 8.0, "p50": 8.0, "p99": 8.0}
    assert 0 < figures["unevenness"] < math.log(128**2)


def test_histogram_bins_are_zero_then_powers_of_two():
    assert histogram(torch.tensor([0.0, 0.0, 1.0, 2.0, 3.0, 4.0, 7.0, 8.0])) == {
        "edges": [0, 1, 2, 4, 8, 16],
        "experts": [2, 1, 2, 2, 1],
    }
    assert histogram(torch.zeros(5)) == {"edges": [0, 1, 2], "experts": [5, 0]}


def test_a_dense_model_has_an_empty_report():
    assert routing_report(model_of(DenseFFN(WIDTH, 4)), [Counting().train_batch(0, 2, 0)]) == {}


def test_spread_of_known_values():
    assert spread(np.arange(101.0)) == {"mean": 50.0, "p50": 50.0, "p99": 99.0}

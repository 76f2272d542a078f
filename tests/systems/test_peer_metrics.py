"""PEER's expert usage and unevenness in the evaluation report (check 10 of the list in test_peer.py)."""

import math

import torch

from moestro.evaluate.routing_report import LayerUsage, unevenness
from moestro.routing import SparseRouting, Trace
from tests.reference import peer
from tests.systems.peer_layers import D, Twin, make_layer, random


def report(expert: torch.Tensor, weight: torch.Tensor) -> dict:
    layer = make_layer()
    usage = LayerUsage(layer)
    usage.add(Trace(layer, random(len(expert), D), SparseRouting.from_topk(expert, weight, 16)))
    return usage.figures()


def test_even_gates_have_no_unevenness() -> None:
    figures = report(torch.arange(16)[:, None], torch.full((16, 1), 0.3))
    assert abs(figures["unevenness"]) < 1e-6 and figures["usage"] == 1.0 and figures["dead"] == 0.0


def test_one_expert_for_everything_has_unevenness_log_n() -> None:
    figures = report(torch.full((16, 1), 5), torch.rand(16, 1))
    assert math.isclose(figures["unevenness"], math.log(16), rel_tol=1e-6)
    assert figures["usage"] == 1 / 16 and figures["dead"] == 15 / 16


def test_gates_count_and_not_rows() -> None:
    """Same experts, same number of rows, other gates: the unevenness is of what the gates say."""
    expert = torch.tensor([[0, 1], [0, 1]])
    even = report(expert, torch.tensor([[0.5, 0.5], [0.5, 0.5]]))
    uneven = report(expert, torch.tensor([[0.9, 0.1], [0.9, 0.1]]))
    assert even["load"] == uneven["load"]
    assert math.isclose(even["unevenness"], math.log(16 / 2), rel_tol=1e-6)
    expected = math.log(16) + 0.9 * math.log(0.9) + 0.1 * math.log(0.1)
    assert math.isclose(uneven["unevenness"], expected, rel_tol=1e-6)


def test_report_equals_reference() -> None:
    """Over several batches of a real layer."""
    layer, share = make_layer(), [0.0] * 16
    usage, batches = LayerUsage(layer), [random(7, D) for _ in range(3)]
    for x in batches:
        with torch.no_grad():
            _, (trace,) = layer(x)
        usage.add(trace)
        _, gates, index = Twin(layer).forward(x)
        share = [a + b / len(batches) for a, b in zip(share, peer.gate_share(gates, index, 16), strict=True)]
    figures = usage.figures()
    assert math.isclose(figures["unevenness"], peer.unevenness(share), rel_tol=1e-9)
    assert figures["usage"] == peer.usage(share)
    assert figures["experts_per_token"]["mean"] == figures["active_width"]["mean"] == 6.0
    assert figures["tokens"] == 21 and sum(figures["load"]) == 21 * 6


def test_experts_without_gates_count_for_nothing() -> None:
    """0 log 0 = 0, and a gate of exactly zero is no use."""
    assert math.isclose(unevenness(torch.tensor([1.0, 1.0, 0.0, 0.0])), math.log(2), rel_tol=1e-9)
    figures = report(torch.tensor([[0, 1]]), torch.tensor([[1.0, 0.0]]))
    assert figures["usage"] == 1 / 16 and figures["dead"] == 14 / 16


def test_closed_gates_are_no_use_and_not_uneven() -> None:
    """ReLU gates may all be 0."""
    figures = report(torch.tensor([[0, 1]]), torch.zeros(1, 2))
    assert figures["unevenness"] == 0.0 and figures["usage"] == 0.0 and figures["dead"] == 14 / 16

"""PEER with padding, in low precision, saved and loaded, and asked for the impossible (check 13 in test_peer.py)."""

import math
from typing import Any

import pytest
import torch

from moestro.experts import SingletonBank
from moestro.routers import ProductKeyRouter
from tests.systems.peer_layers import (
    D,
    Norm,
    batch_norm,
    grad,
    make_layer,
    random,
    set_running_statistics,
)  # fmt: skip
from tests.tolerances import BFLOAT16_NORM, FLOAT64

close = torch.testing.assert_close


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_padding_reaches_neither_statistics_nor_experts(norm: Norm) -> None:
    layer = make_layer(norm=norm)
    keep = torch.tensor([[True, True, False, True], [False, True, True, False]])
    x = random(2, 4, D)
    alone, (expected,) = layer(x[keep])
    for filler in (x, x.masked_fill(~keep[..., None], 1e30)):
        leaf = filler.clone().requires_grad_()
        y, (trace,) = layer(leaf, keep)
        close(y[keep], alone, **FLOAT64)
        assert torch.count_nonzero(y[~keep]) == 0
        if norm == "batch":
            for a, b in zip(trace.routing.query_stats[:2], expected.routing.query_stats[:2], strict=True):
                close(a, b, **FLOAT64)
            assert trace.routing.query_stats[2] == 5
        y.sum().backward()
        assert torch.count_nonzero(grad(leaf)[~keep]) == 0 and torch.count_nonzero(grad(leaf)[keep]) > 0


def test_bfloat16_retrieves_in_float32() -> None:
    """Check 13: same experts as in float32 on the same (rounded) numbers; output within the stated tolerance."""
    layer = make_layer(side=8, heads=2, k=4, d_key=8).bfloat16()
    exact = make_layer(side=8, heads=2, k=4, d_key=8)
    exact.load_state_dict(layer.state_dict())
    x = random(40, D).bfloat16()
    y, (trace,) = layer(x)
    y_exact, (trace_exact,) = exact(x.double())
    assert y.dtype == torch.bfloat16 and trace.routing.weight.dtype == torch.float32
    assert torch.equal(trace.routing.expert, trace_exact.routing.expert)
    close(trace.routing.weight.double(), trace_exact.routing.weight, rtol=1e-4, atol=1e-6)
    assert float(((y.double() - y_exact).norm() / y_exact.norm()).detach()) < BFLOAT16_NORM


def test_autocast_keeps_choices_and_gradients() -> None:
    """Choices and gates are float32's to the bit; gradients are float32 and within the stated tolerance."""
    layer = make_layer(side=8, heads=2, k=4, d_key=8).float()
    x, cotangent, results = random(40, D).float(), random(40, D).float(), []
    for enabled in (False, True):
        layer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y, (trace,) = layer(x)
        assert y.dtype == (torch.bfloat16 if enabled else torch.float32)
        y.backward(cotangent.to(y.dtype))
        gradients = [grad(parameter).double() for parameter in layer.parameters()]
        assert all(grad(parameter).dtype == torch.float32 for parameter in layer.parameters())
        results.append((trace.routing.expert, trace.routing.weight, gradients))
    (expert, weight, plain), (expert16, weight16, lowered) = results
    assert torch.equal(expert, expert16) and torch.equal(weight, weight16)
    for a, b in zip(lowered, plain, strict=True):
        assert float((a - b).norm() / b.norm()) < BFLOAT16_NORM


def test_state_dict_round_trip() -> None:
    """Check 13: including running statistics."""
    layer, other = make_layer(), make_layer()
    set_running_statistics(layer)
    x = random(10, D)
    other.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(layer.eval()(x)[0], other.eval()(x)[0])
    assert torch.equal(batch_norm(layer).variance, batch_norm(other).variance)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_experts": 15}, "n_experts=15 is not a square; nearest: 9 and 16"),
        ({"top_k": 5}, "top_k=5, allowed: 1 to 4"),
        ({"d_key": 5}, "d_key=5, allowed: an even number"),
        ({"heads": 0}, "heads=0, allowed: at least 1"),
    ],
)
def test_impossible_routers_are_refused(arguments: dict, message: str) -> None:
    good: dict[str, Any] = {"d_model": D, "n_experts": 16, "heads": 2, "top_k": 3, "d_key": 6}
    ProductKeyRouter(**good)
    with pytest.raises(ValueError, match=message):
        ProductKeyRouter(**(good | arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": 0}, "heads=0, allowed: at least 1"),
        ({"top_k": 0}, "top_k=0, allowed: at least 1"),
    ],
)
def test_impossible_starts_of_tables_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SingletonBank(D, 16, **({"heads": 2, "top_k": 3} | arguments))


def test_reindexing_experts_behind_product_keys_is_refused() -> None:
    with pytest.raises(ValueError, match="product keys"):
        make_layer().reindex(torch.arange(16))


def test_batch_of_no_tokens() -> None:
    layer = make_layer()
    y, (trace,) = layer(random(0, D))
    assert y.shape == (0, D) and trace.routing.n_rows == 0 and math.prod(y.shape) == 0

"""One token through a PEER layer on Triton's kernels: what it computes, and how many kernels a GPU would run for it."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moestro.experts import GLUSingletonBank, SingletonBank, ValueBank
from moestro.layers import MoELayer
from moestro.ops import backend
from moestro.ops.few_queries import MOST_TOKENS
from moestro.routers import ProductKeyRouter
from moestro.routers.query_norm import BatchQueryNorm
from moestro.routing import SparseRouting
from tests.ops.test_triton_peer import assert_near
from tests.ops.triton_cases import DEVICE, why_not
from tests.tolerances import FLOAT16_NORM, FLOAT32_NORM

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())
D, SIDE = 20, 7


class Kernels(TorchDispatchMode):
    """What would run on a GPU: Triton's kernels, and operations of torch that are more than a view or new memory."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.names, self.inside = [], False
        from moestro.ops import triton_peer_keys, triton_peer_rows

        for module in (triton_peer_keys, triton_peer_rows):
            monkeypatch.setattr(module, "launch", self.launching(module.launch))

    def launching(self, launch):
        def counted(kernel, *arguments, **constants):
            self.names.append(kernel.__name__)
            # the interpreter copies tensors
            self.inside = True
            launch(kernel, *arguments, **constants)
            self.inside = False

        return counted

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        out, name = operation(*arguments, **(keywords or {})), operation.name().split("::")[1]
        view = all(value.alias_info and not value.alias_info.is_write for value in operation._schema.returns)
        if not self.inside and not view and "empty" not in name and name != "promote_types":
            self.names.append(name)
        return out


def make_layer(norm, gate: Any = "softmax", shared=True, bank=SingletonBank, top_k=3):
    torch.manual_seed(0)
    router = ProductKeyRouter(D, SIDE**2, 2, top_k, 10, shared_keys=shared, query_norm=norm, gate=gate)
    layer = MoELayer(router, [bank(D, SIDE**2)])
    for parameter in router.query_norm.parameters():
        torch.nn.init.normal_(parameter, mean=1.0, std=0.5)
    if isinstance(router.query_norm, BatchQueryNorm):
        router.query_norm.update(torch.randn(20), torch.rand(20) + 0.5)
    return layer.to(DEVICE).eval()


def evaluated(layer, x, name):
    with torch.no_grad(), backend.force(name):
        y, (trace,) = layer(x)
    assert isinstance(trace.routing, SparseRouting)
    return y, trace.routing


@pytest.mark.parametrize(
    ("norm", "gate", "shared", "bank", "top_k", "tokens"),
    [
        ("batch", "softmax", True, SingletonBank, 3, 1),
        ("batch", "sigmoid", False, GLUSingletonBank, 1, 2),
        ("none", "relu", True, ValueBank, 7, 2),
        ("layer", "softmax", False, SingletonBank, 2, 1),
        ("qk_rms", "sigmoid", True, SingletonBank, 4, 1),
    ],
)
def test_few_tokens_equal_the_definition(norm, gate, shared, bank, top_k, tokens):
    layer, x = make_layer(norm, gate, shared, bank, top_k), torch.randn(tokens, D, device=DEVICE)
    have, routing = evaluated(layer, x, "triton")
    want, definition = evaluated(layer.double(), x.double(), "reference")
    assert routing.fixed == definition.fixed and routing.n_tokens == tokens
    assert torch.equal(routing.token, definition.token) and torch.equal(routing.expert, definition.expert)
    assert_near([have, routing.weight], [want, definition.weight], FLOAT32_NORM)


def test_few_tokens_in_float16():
    """Nothing is rounded but the output: the reference has the same weights, widened."""
    layer, x = make_layer("batch").half(), torch.randn(1, D, device=DEVICE).half()
    have, routing = evaluated(layer, x, "triton")
    want, definition = evaluated(layer.double(), x.double(), "reference")
    assert have.dtype == torch.float16 and routing.weight.dtype == torch.float32
    assert torch.equal(routing.expert, definition.expert)
    assert_near([routing.weight], [definition.weight], FLOAT32_NORM)
    assert_near([have], [want], FLOAT16_NORM)


@pytest.mark.parametrize(
    ("norm", "gate", "dtype"),
    [("batch", "softmax", torch.float32), ("batch", "relu", torch.float16), ("none", "sigmoid", torch.float32)],
)
def test_a_token_takes_four_kernels(norm, gate, dtype, monkeypatch):
    layer, x = make_layer(norm, gate).to(dtype), torch.randn(1, 1, D, device=DEVICE, dtype=dtype)
    # the first evaluation copies the staircase, and asks whether there are statistics
    evaluated(layer, x, "triton")
    with Kernels(monkeypatch) as kernels:
        evaluated(layer, x, "triton")
    assert kernels.names == ["_query_kernel", "_side_kernel", "_pair_kernel", "_forward_kernel"]


def test_the_count_can_fail(monkeypatch):
    """Where gradients are wanted the queries, their norm and the gates are operations of torch."""
    layer, x = make_layer("batch"), torch.randn(1, D, device=DEVICE)
    with Kernels(monkeypatch) as kernels, backend.force("triton"):
        layer(x)
    assert len(kernels.names) > 10 and {"mm", "_softmax", "_side_kernel"} <= set(kernels.names)


def test_many_tokens_and_training_take_the_other_way(monkeypatch):
    layer = make_layer("none")
    for tokens, few in ((MOST_TOKENS, True), (MOST_TOKENS + 1, False)):
        with Kernels(monkeypatch) as kernels:
            evaluated(layer, torch.randn(tokens, D, device=DEVICE), "triton")
        assert ("_query_kernel" in kernels.names) is few
    routing = evaluated(make_layer("batch").train(), torch.randn(4, D, device=DEVICE), "triton")[1]
    assert routing.query_stats is not None


def test_statistics_are_asked_for_once_and_again_after_loading():
    norm, fresh = BatchQueryNorm(2, 10), BatchQueryNorm(2, 10)
    norm.update(torch.randn(20), torch.rand(20))
    assert norm.by_feature().mean is norm.mean
    norm.load_state_dict(fresh.state_dict())
    with pytest.raises(RuntimeError, match="no running statistics yet"):
        norm.by_feature()

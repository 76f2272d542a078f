"""Modes of PEER's parts against `tests/reference/peer.py`, in float64: gated neurons, plain values, experts beside a
dense branch; outputs and every gradient."""

import pytest
import torch
from torch import Tensor

from moestro.experts import GLUSingletonBank, SharedExpert, TableBank, ValueBank
from moestro.layers import MoELayer
from moestro.ops import backend
from moestro.routers import ProductKeyRouter
from tests.reference import hmoe, peer
from tests.systems.peer_layers import D, Gate, copy, random
from tests.tolerances import FLOAT64

close = torch.testing.assert_close
SIDE, HEADS, K, KEY = 4, 2, 3, 6
BANKS = {"glu": GLUSingletonBank, "value": ValueBank}


def make(kind: str, gate: Gate = "softmax", sparse: bool = False) -> MoELayer:
    router = ProductKeyRouter(D, SIDE**2, HEADS, K, KEY, query_norm="none", gate=gate)
    return MoELayer(router, [BANKS[kind](D, SIDE**2, sparse_gradients=sparse), SharedExpert(D, 3)]).double()


def reference(layer: MoELayer, x: Tensor, leaves: dict[str, Tensor], gate: Gate) -> Tensor:
    tables = {name.rsplit(".", 1)[1]: leaf for name, leaf in leaves.items() if name.startswith("branches.0.")}

    def each(x_t: Tensor, i: int) -> Tensor:
        if "values" in tables:
            return tables["values"][i]
        return peer.glu_expert(x_t, tables["gate"][i], tables["up"][i], tables["down"][i])

    first, second = leaves["router.keys"].squeeze(1)
    q = peer.queries(x, leaves["router.query"])
    y, _, _ = peer.mixture(x, q, first, second, each, heads=HEADS, k=K, kind=gate)
    opened, up = leaves["branches.1.w_in.weight"].chunk(2)
    dense = (opened, up, leaves["branches.1.w_out.weight"])
    return y + torch.stack([hmoe.swiglu_expert(x_t, dense) for x_t in x])


@pytest.mark.parametrize("how", ["fused", "reference"])
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("gate", ["softmax", "sigmoid", "relu"])
@pytest.mark.parametrize("kind", BANKS)
def test_layer_beside_a_dense_branch_equals_reference(kind: str, gate: Gate, sparse: bool, how: str) -> None:
    """Kim & Jung's placement (parallel to the feed-forward layer); values and gated neurons by id."""
    layer, x, cotangent = make(kind, gate, sparse), random(7, D), random(7, D)
    leaves = {name: copy(parameter) for name, parameter in layer.named_parameters()}
    ours, theirs = copy(x), copy(x)
    with backend.force(how):
        y, _ = layer(ours)
        y.backward(cotangent)
    want = reference(layer, theirs, leaves, gate)
    close(y, want, **FLOAT64)
    want.backward(cotangent)
    close(ours.grad, theirs.grad, **FLOAT64)
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None
        close(parameter.grad.to_dense(), leaves[name].grad, **FLOAT64, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("kind", BANKS)
def test_flops_parameters_and_row_parameters(kind: str) -> None:
    layer = make(kind, sparse=True)
    _, (trace,) = layer(random(7, D))
    tables = {"glu": 3, "value": 1}[kind]
    assert isinstance(layer.bank, TableBank) and len(layer.bank.row_parameters()) == tables
    assert sum(p.numel() for p in layer.bank.parameters()) == tables * SIDE**2 * D
    assert layer.bank.flops(trace.routing).useful == 7 * HEADS * K * tables * 2 * D
    assert layer.expert_widths() == (1.0 if kind == "glu" else 0.0)


def test_a_bank_without_experts_is_refused() -> None:
    with pytest.raises(ValueError, match="n_experts=0, allowed: at least 1"):
        ValueBank(D, 0)

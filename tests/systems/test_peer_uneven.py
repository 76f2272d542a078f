"""PEER over experts of several widths (ours): layer and penalty against `tests/reference/peer.py`, and where the
penalty leads."""

import pytest
import torch
from torch import Tensor

from moestro.experts import FFNBank, RaggedBank, SingletonBank
from moestro.layers import MoELayer
from moestro.objectives import ParameterPenalty, RetrievedParameterPenalty
from moestro.ops import backend
from moestro.routers import LinearScore, ProductKeyRouter, ScoredRouter, SlotRouter, TopK
from moestro.routing import SparseRouting, Trace
from tests.reference import peer
from tests.systems.peer_layers import D, Gate, copy, random
from tests.tolerances import FLOAT64

close = torch.testing.assert_close
HEADS, K = 2, 3
# of 16 experts, those of the first two sub-keys have one neuron
WIDTHS = [1] * 8 + [2] * 4 + [5] * 4


def make(gate: Gate = "softmax", sparse: bool = False) -> MoELayer:
    router = ProductKeyRouter(D, 16, HEADS, K, 6, query_norm="none", gate=gate)
    return MoELayer(router, [RaggedBank(D, WIDTHS, sparse_gradients=sparse)]).double()


def reference(x: Tensor, leaves: dict[str, Tensor], gate: Gate) -> tuple[Tensor, Tensor, list[list[list[int]]]]:
    up, down = (leaves[f"branches.0.{name}"].split(WIDTHS) for name in ("up", "down"))
    first, second = leaves["router.keys"].squeeze(1)
    q = peer.queries(x, leaves["router.query"])
    return peer.mixture(
        x, q, first, second, lambda x_t, i: peer.wide_expert(x_t, up[i], down[i]), heads=HEADS, k=K, kind=gate
    )


@pytest.mark.parametrize("how", ["fused", "reference"])
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("gate", ["softmax", "sigmoid", "relu"])
def test_layer_and_penalty_equal_reference(gate: Gate, sparse: bool, how: str) -> None:
    """Output, penalty, and the gradient of their sum for everything."""
    layer, x, cotangent = make(gate, sparse), random(9, D), random(9, D)
    leaves = {name: copy(parameter) for name, parameter in layer.named_parameters()}
    ours, theirs = copy(x), copy(x)
    with backend.force(how):
        y, (trace,) = layer(ours)
        penalty = RetrievedParameterPenalty()(trace)
        ((y * cotangent).sum() + 3 * penalty).backward()
    want, gates, index = reference(theirs, leaves, gate)
    want_penalty = peer.parameter_penalty(WIDTHS, gates, index)
    ((want * cotangent).sum() + 3 * want_penalty).backward()
    close(y, want, **FLOAT64)
    close(penalty, want_penalty, **FLOAT64)
    close(ours.grad, theirs.grad, **FLOAT64)
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None
        close(parameter.grad.to_dense(), leaves[name].grad, **FLOAT64, msg=lambda m, name=name: f"{name}: {m}")


def test_the_gradient_of_a_gate_is_the_documented_one() -> None:
    layer = make("sigmoid")
    expert, gates = torch.randint(16, (20, 6)), torch.rand(20, 6, dtype=torch.float64, requires_grad=True)
    penalty = RetrievedParameterPenalty()(Trace(layer, random(20, D), SparseRouting.from_topk(expert, gates, 16)))
    (have,) = torch.autograd.grad(penalty, gates)
    width = torch.tensor(WIDTHS)[expert]
    pool = {1: 8, 2: 4, 5: 4}
    for t, c in ((0, 0), (7, 3), (19, 5)):
        w = int(width[t, c])
        share = float((width == w).double().mean())
        want = (16 * w / (pool[w] * (sum(WIDTHS) / 16)) * share - penalty) / gates.sum()
        close(have[t, c], want, **FLOAT64)


def test_even_use_costs_one_and_equal_widths_always_do() -> None:
    expert, gates = torch.arange(16).view(4, 4), torch.full((4, 4), 0.25, dtype=torch.float64)
    even = RetrievedParameterPenalty()(Trace(make(), random(4, D), SparseRouting.from_topk(expert, gates, 16)))
    assert abs(float(even) - 1) < 1e-12
    equal = MoELayer(ProductKeyRouter(D, 16, HEADS, K, 6), [SingletonBank(D, 16)]).double()
    assert abs(RetrievedParameterPenalty()(equal(random(8, D))[1][0]).item() - 1) < 1e-12


def test_where_every_token_has_every_expert_it_is_the_parameter_penalty() -> None:
    layer = MoELayer(ScoredRouter(LinearScore(D, 4, init_std=1.0), TopK(4)), [FFNBank(D, [1, 2, 3, 6])]).double()
    _, (trace,) = layer(random(9, D))
    close(4 * RetrievedParameterPenalty()(trace), ParameterPenalty()(trace), **FLOAT64)


def test_the_penalty_alone_leads_to_narrow_experts_and_not_to_one_width() -> None:
    """To loads in proportion to 1 / width, as HMoE's: 128 + 32 + 12.8 rows where 128 + 64 + 64 would be even."""
    torch.manual_seed(0)
    router = ProductKeyRouter(16, 256, heads=4, top_k=4, d_key=16)
    layer = MoELayer(router, [RaggedBank(16, [1] * 128 + [2] * 64 + [5] * 64)])
    x = torch.randn(256, 16)
    optimizer = torch.optim.Adam(router.parameters(), lr=0.01)
    before = float(layer(x)[1][0].active_width().mean())
    for _ in range(150):
        _, (trace,) = layer(x)
        optimizer.zero_grad()
        RetrievedParameterPenalty()(trace).backward()
        optimizer.step()
    routing = layer(x)[1][0].routing
    share = torch.bincount(layer.bank.row_widths().long()[routing.expert], minlength=6) / routing.n_rows
    after = float(routing.per_token(layer.bank.row_widths().float()).mean())
    assert after < 0.8 * before
    close(share[[1, 2, 5]], torch.tensor([128, 32, 12.8]) / 172.8, rtol=0, atol=0.02)


def test_soft_routings_are_refused() -> None:
    layer = MoELayer(SlotRouter(D, 16), [RaggedBank(D, WIDTHS)]).double()
    with pytest.raises(ValueError, match="needs chosen experts, SlotRouting has none"):
        RetrievedParameterPenalty()(layer(random(4, D))[1][0])


def test_no_tokens_cost_nothing() -> None:
    layer = make()
    assert float(RetrievedParameterPenalty()(layer(random(0, D))[1][0])) == 0


def test_counts() -> None:
    """2 d sum(widths) parameters; FLOPs and active width from the experts met, on the meta device before that."""
    layer = make(sparse=True)
    _, (trace,) = layer(random(7, D))
    width = torch.tensor(WIDTHS)[trace.routing.expert].sum()
    assert sum(p.numel() for p in layer.bank.parameters()) == 2 * sum(WIDTHS) * D
    assert layer.bank.flops(trace.routing).useful == 4 * D * width == 4 * D * trace.active_width().sum()
    assert len(layer.bank.row_parameters()) == 2
    with torch.device("meta"):
        meta = make()
    assert meta.bank.expected_token_flops(6) == 6 * 4 * D * sum(WIDTHS) / 16


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_output_starts_at_the_scale_asked_for(gate: Gate) -> None:
    router = ProductKeyRouter(128, 64 * 64, heads=4, top_k=16, d_key=32, gate=gate)
    bank = RaggedBank(128, [1] * 2048 + [2] * 1024 + [4] * 1024, heads=4, top_k=16, gate=gate)
    with torch.no_grad():
        y, _ = MoELayer(router, [bank])(torch.randn(500, 128))
    assert abs(float(y.std()) / 0.6 - 1) < (0.1 if gate == "softmax" else 0.25)


@pytest.mark.parametrize(("widths", "message"), [([], "n_experts=0, allowed"), ([1, 0], "has 0, allowed: at least 1")])
def test_impossible_widths_are_refused(widths: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RaggedBank(D, widths)

"""A dense network cut into experts is the dense network when all of them are used (check f of XMoE's specification)."""

import pytest
import torch

from moestro.experts import SharedExpert, split_ffn
from moestro.layers import DenseFFN, MoELayer
from moestro.routers import LinearScore, ScoredRouter, TopP
from moestro.routing import SparseRouting
from tests.tolerances import FLOAT64

D, WIDTHS = 6, [3, 0, 5, 4]


def dense(glu: bool) -> SharedExpert:
    torch.manual_seed(2)
    return SharedExpert(D, sum(WIDTHS), "gelu", glu).double()


def tokens() -> torch.Tensor:
    return torch.randn(11, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("glu", [True, False])
@pytest.mark.parametrize("gate", [1.0, 0.25])
def test_all_experts_are_the_dense_network(glu: bool, gate: float) -> None:
    whole, x = dense(glu), tokens().requires_grad_()
    bank = split_ffn(whole, WIDTHS, gate)
    expert = torch.arange(4).expand(11, 4)
    routing = SparseRouting.from_topk(expert, torch.full((11, 4), gate, dtype=torch.float64), 4)
    y, want = bank(x, routing), whole(x)
    torch.testing.assert_close(y, want, **FLOAT64)
    (have_x,), (want_x,) = (torch.autograd.grad(out.square().sum(), [x]) for out in (y, want))
    torch.testing.assert_close(have_x, want_x, **FLOAT64)
    assert sum(p.numel() for p in bank.parameters()) == sum(p.numel() for p in whole.parameters())


def test_parts_are_the_units_in_order() -> None:
    whole, x = dense(glu=False), tokens()
    bank = split_ffn(whole, WIDTHS)
    offsets = torch.tensor([0, 0, 0, 11, 11])
    hidden = torch.nn.functional.gelu(x @ whole.w_in.weight[3:8].T)
    torch.testing.assert_close(bank.run(x, offsets), hidden @ whole.w_out.weight[:, 3:8].T, **FLOAT64)


def test_a_layer_with_even_gates_and_every_expert_starts_as_the_dense_layer() -> None:
    layer = DenseFFN(D, 12).double()
    router = ScoredRouter(LinearScore(D, 4, init_std=0.0), TopP(1.0, renormalize=False))
    moe = MoELayer(router, [split_ffn(layer.expert, [3] * 4, gate=1 / 4)]).double()
    torch.testing.assert_close(moe(tokens())[0], layer(tokens())[0], **FLOAT64)
    assert {p.data_ptr() for p in moe.parameters()}.isdisjoint(p.data_ptr() for p in layer.parameters())


def test_impossible_cuts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"widths=\[3, 4\] sum to 7, allowed: 12, the dense width"):
        split_ffn(dense(glu=True), [3, 4])
    with pytest.raises(ValueError, match="gate=0, allowed: above 0"):
        split_ffn(dense(glu=True), WIDTHS, 0)

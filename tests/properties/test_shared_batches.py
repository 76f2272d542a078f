"""A micro-batch shared by two processes: each one's objective is that of the whole, its gradients those of its part."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moestro.experts import FFNBank
from moestro.layers import MoELayer
from moestro.objectives import (
    ClusterVariance,
    FirstChoiceBalance,
    GateBalance,
    GateEfficiency,
    GateL1,
    GroupPenalty,
    IntraGroupBalance,
    LoadBalance,
    MutualDistillation,
    Objective,
    ParameterPenalty,
    RetrievedParameterPenalty,
    RouterEntropy,
    RouterZLoss,
    WeightedBalance,
)
from moestro.routers import LinearScore, ReLU, ScoredRouter, Select, TopAny, TopK
from moestro.routing import Trace
from tests.tolerances import FLOAT64

WIDTHS = [2, 2, 3, 3, 5, 5]
E = len(WIDTHS)
SELECTS: dict[type, Callable[[], Select]] = {
    GateBalance: lambda: TopAny(E).double(),
    GateEfficiency: lambda: TopAny(E).double(),
    GateL1: lambda: ReLU(2, pressure=0.5),
}
OBJECTIVES: list[Objective] = [
    *(ClusterVariance(form) for form in ("all", "within", "gap", "token_gap")),
    *(kind() for kind in (LoadBalance, ParameterPenalty, WeightedBalance, GroupPenalty, IntraGroupBalance)),
    *(kind() for kind in (FirstChoiceBalance, RetrievedParameterPenalty, GateBalance, GateEfficiency, GateL1)),
    RouterEntropy(scale_by_n=True),
    RouterZLoss(),
    MutualDistillation(),
    MutualDistillation("cosine"),
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_parts_have_the_value_and_the_gradients_of_the_whole(objective: Objective) -> None:
    router = ScoredRouter(LinearScore(4, E), SELECTS.get(type(objective), lambda: TopK(2))())
    layer = MoELayer(router, [FFNBank(4, WIDTHS)], clusters=3)
    logits = torch.randn(13, E, dtype=torch.float64, requires_grad=True)
    outputs = torch.randn(13, 2, 4, dtype=torch.float64, requires_grad=True)
    leaves = [logits, outputs]

    def value(rows: slice, everyone: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        own, recorded = logits[rows], outputs[rows].flatten(0, 1)
        return objective(Trace(layer, own.new_zeros(len(own), 4), router.routed(own), recorded, everyone=everyone))

    def slopes(of: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(of, leaves, materialize_grads=True)

    want = value(slice(None))
    wanted = slopes(want)
    assert any(bool(slope.any()) for slope in wanted)
    parts = slice(0, 4), slice(4, 13)
    for mine, other in (parts, parts[::-1]):
        sent: list[Tensor] = []
        value(other, lambda own, sent=sent: sent.append(own.detach()) or own)
        have = value(mine, lambda own, sent=sent: own + sent.pop(0))
        torch.testing.assert_close(have, want, **FLOAT64)
        for slope, whole in zip(slopes(have), wanted, strict=True):
            torch.testing.assert_close(slope[mine], whole[mine], **FLOAT64)

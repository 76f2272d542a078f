"""PEER's training step on Triton's kernels does not make the host wait for a GPU, so far as is known without one."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moestro.experts import GLUSingletonBank, QuantizedBank, SingletonBank, ValueBank
from moestro.layers import MoELayer
from moestro.ops import backend
from moestro.ops.row_gradients import collect_factors, row_gradient
from moestro.ops.triton_ffn_plan import launch
from moestro.routers import ProductKeyRouter
from tests.ops.triton_cases import DEVICE, why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())
D, SIDE = 20, 7
# Operations whose result, or its size, the host needs from the device, and `lift_fresh`: numbers of the host that are
# made a tensor, whose copy to a device is waited for.
WAITING = ("_local_scalar_dense", "nonzero", "bincount", "unique", "repeat_interleave", "masked_select", "lift_fresh")


class Waits(TorchDispatchMode):
    """Names of the operations for which the host would wait."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.names, self.inside = [], False
        from moestro.ops import triton_peer_keys, triton_peer_rows

        for module in (triton_peer_keys, triton_peer_rows):
            monkeypatch.setattr(module, "launch", self.launching)

    def launching(self, *arguments, **constants):
        # the interpreter reads numbers that kernels read
        self.inside = True
        launch(*arguments, **constants)
        self.inside = False

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        name = operation.name().split("::")[1]
        if not self.inside and name.startswith(WAITING) and not (keywords or {}).get("output_size"):
            self.names.append(name)
        return operation(*arguments, **(keywords or {}))


def make_layer(bank, sparse: bool) -> MoELayer:
    torch.manual_seed(0)
    layer = MoELayer(ProductKeyRouter(D, SIDE**2, 2, 3, 10), [bank(D, SIDE**2, sparse_gradients=sparse)])
    return layer.to(DEVICE)


def step(layer: MoELayer) -> None:
    with backend.force("triton"):
        y, _ = layer(torch.randn(5, D, device=DEVICE, requires_grad=True))
        y.square().sum().backward()


@pytest.mark.parametrize("bank", [SingletonBank, GLUSingletonBank, ValueBank])
def test_dense_tables_wait_for_nothing(bank, monkeypatch):
    layer = make_layer(bank, sparse=False)
    step(layer)
    with Waits(monkeypatch) as waits:
        step(layer)
    assert not waits.names


@pytest.mark.parametrize("bank", [SingletonBank, ValueBank])
def test_sparse_tables_wait_once_for_how_many_rows_are_met(bank, monkeypatch):
    layer = make_layer(bank, sparse=True)
    step(layer)
    with Waits(monkeypatch) as waits:
        step(layer)
    assert waits.names == ["unique_consecutive"]


@pytest.mark.parametrize("bank", [SingletonBank, QuantizedBank])
def test_gradients_in_factors_wait_once_a_pass_and_once_to_be_merged(bank, monkeypatch):
    layer = make_layer(bank, sparse=True)
    tables = layer.banks()[0].row_parameters()
    collect_factors(tables)
    with Waits(monkeypatch) as waits:
        step(layer)
        step(layer)
        assert row_gradient(tables[0]) is not None
    assert waits.names == ["unique_consecutive"] * 3

"""Weights of the package PEER-pytorch, where it is installed: its output and gradients, to rounding."""

import pytest
import torch
from torch import nn

from moestro.layers.peer_pytorch import from_peer_pytorch
from tests.tolerances import FLOAT64

close = torch.testing.assert_close
D = 8


def package_layer(**more) -> nn.Module:
    package = pytest.importorskip("PEER_pytorch", reason="the package PEER-pytorch is not installed")
    settings = {"heads": 3, "num_experts": 25, "num_experts_per_head": 4, "dim_key": 6} | more
    torch.manual_seed(0)
    peer = package.PEER(D, **settings).double()
    with torch.no_grad():
        # its keys start at 0.02, where every gate is the same to a few digits
        peer.keys.mul_(20)
        for name, parameter in peer.named_parameters():
            if "gamma" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return peer


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"non_competing_scores": False},
        {"non_competing_scores": False, "pre_rmsnorm": True, "activation": nn.SiLU},
        {"pre_rmsnorm": True, "activation": nn.ReLU, "product_key_topk": 2},
        {"non_competing_scores": False, "dim_key": None, "heads": 1, "activation": nn.Identity},
        {"non_competing_scores": False, "num_experts_per_head": 5},
    ],
    ids=str,
)
def test_output_and_gradients_are_the_packages(settings: dict) -> None:
    peer = package_layer(**settings)
    layer, norm = from_peer_pytorch(peer)
    x = torch.randn(2, 7, D, dtype=torch.float64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, (trace,) = layer(ours if norm is None else norm(ours))
    want = peer(theirs)
    close(y, want, **FLOAT64)
    assert want.abs().max() > 0 and trace.routing.n_rows == 14 * layer.router.rows_per_token()
    cotangent = torch.randn_like(x)
    y.backward(cotangent)
    want.backward(cotangent)
    close(ours.grad, theirs.grad, **FLOAT64)
    close(layer.bank.up.grad, peer.weight_down_embed.weight.grad, **FLOAT64)
    close(layer.bank.down.grad, peer.weight_up_embed.weight.grad, **FLOAT64)
    close(layer.router.keys.grad, peer.keys.grad.permute(2, 0, 1, 3), **FLOAT64)


def test_weights_are_copies_of_the_same_dtype() -> None:
    peer = package_layer().float()
    layer, _ = from_peer_pytorch(peer)
    assert {p.dtype for p in layer.parameters()} == {torch.float32}
    assert sum(p.numel() for p in layer.parameters()) == sum(p.numel() for p in peer.parameters())
    theirs = {p.data_ptr() for p in peer.parameters()}
    assert not theirs & {p.data_ptr() for p in layer.parameters()}


def test_its_default_is_one_expert_a_head_with_a_relu_gate() -> None:
    layer, norm = from_peer_pytorch(package_layer(num_experts_per_head=4))
    assert (layer.router.top_k, layer.router.gate, norm) == (1, "relu", None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"separate_embed_per_head": True}, "separate_embed_per_head=True, allowed: False"),
        ({"non_competing_scores": False, "product_key_topk": 3}, "product_key_topk=3, allowed: at least 4"),
        ({"activation": nn.Tanh}, r"activation=Tanh\(\), allowed: GELU"),
        ({"activation": lambda: nn.GELU("tanh")}, "allowed: GELU .exact."),
    ],
)
def test_what_cannot_be_reproduced_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_peer_pytorch(package_layer(**settings))


def test_other_modules_are_refused() -> None:
    with pytest.raises(ValueError, match="Linear is no PEER of PEER-pytorch"):
        from_peer_pytorch(nn.Linear(2, 2))

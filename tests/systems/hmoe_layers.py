"""HMoE layers for the tests of this folder, taken apart expert by expert so that they meet the reference."""

import torch
from torch import Tensor, nn

from moestro.experts import FFNBank
from moestro.layers import ActiveRows, MoELayer
from moestro.routers import LinearScore, ScoredRouter, Select
from moestro.routing import SparseRouting
from tests.reference import hmoe
from tests.tolerances import FLOAT64

D = 6


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def make_layer(widths: list[int], select: Select, record: ActiveRows | None = None) -> MoELayer:
    # a router of standard deviation 1 makes decisive probabilities, so that top-p chooses different numbers
    router = ScoredRouter(LinearScore(D, len(widths), init_std=1.0), select)
    return MoELayer(router, [FFNBank(D, widths)], record=record).double()


def router_weight(layer: MoELayer) -> nn.Parameter:
    assert isinstance(layer.router, ScoredRouter)
    return layer.router.score.weight


def bank_of(layer: MoELayer) -> FFNBank:
    assert isinstance(layer.bank, FFNBank)
    return layer.bank


def triples(w_in: Tensor, w_out: Tensor, widths: list[int]) -> list[hmoe.Expert]:
    """Every expert's (W_g, W_p, W_o) out of unit-major storage: gate rows, up rows; one row of w_out a unit."""
    out, unit = [], 0
    for width in widths:
        block = w_in[2 * unit : 2 * (unit + width)]
        out.append((block[:width], block[width:], w_out[unit : unit + width].T))
        unit += width
    return out


def leaves(bank: FFNBank) -> list[hmoe.Expert]:
    """Every expert's weights as tensors of their own, whose gradients can be asked for one by one."""
    experts = triples(bank.w_in.weight.detach(), bank.w_out.weight.detach(), list(bank.widths))
    return [tuple(w.clone().requires_grad_() for w in expert) for expert in experts]  # type: ignore[misc]


def grad(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def gradient(bank: FFNBank) -> list[hmoe.Expert]:
    """Gradient of every expert's (W_g, W_p, W_o)."""
    return triples(grad(bank.w_in.weight), grad(bank.w_out.weight), list(bank.widths))


def assert_same_experts(bank: FFNBank, experts: list[hmoe.Expert]) -> None:
    """Gradient of W_g, W_p, W_o of each expert, one by one; a gradient nobody computed is zero."""
    for e, (ours, theirs) in enumerate(zip(gradient(bank), experts, strict=True)):
        for name, mine, weight in zip(("W_g", "W_p", "W_o"), ours, theirs, strict=True):
            expected = torch.zeros_like(weight) if weight.grad is None else weight.grad
            where = f"{name} of expert {e}: "
            torch.testing.assert_close(mine, expected, **FLOAT64, msg=lambda m, where=where: where + m)


def hand_made(busy: Tensor) -> tuple[SparseRouting, list[list[int]]]:
    """busy[t, e]: who computes what; weights are a leaf, rows in shuffled order."""
    token, expert = busy.nonzero(as_tuple=True)
    shuffle = torch.randperm(len(token))
    weight = random(len(token)).requires_grad_()
    members = [row.nonzero().flatten().tolist() for row in busy]
    return SparseRouting(token[shuffle], expert[shuffle], weight, len(busy), busy.shape[1]), members


def stored(bank: FFNBank) -> tuple[Tensor, Tensor]:
    return bank.w_in.weight, bank.w_out.weight

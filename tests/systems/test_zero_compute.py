"""Copy, constant and zero experts beside feed-forward ones in one routing, against MoE++'s equations."""

import pytest
import torch

from moestro.experts import ConstantBank, CopyBank, FFNBank, MixedBank, SingletonBank
from moestro.layers import MoELayer
from moestro.model import Transformer
from moestro.model.active import idle_parameters
from moestro.ops import backend
from moestro.recipe.build import build_model
from moestro.recipe.load import load_recipe
from moestro.recipe.syntax import RecipeError
from moestro.routers import LinearScore, ScoredRouter, TopK, TopP
from tests.conftest import ROOT
from tests.reference import zero_compute as reference
from tests.tolerances import FLOAT64

D, WIDTHS = 6, [3, 5, 0]
RECIPE = ROOT / "recipes" / "moe.yaml"


def mixture(select: TopK | TopP) -> MoELayer:
    """Experts 0 and 1 feed-forward, 2 zero, 3 copy, 4 and 5 constant."""
    torch.manual_seed(5)
    bank = MixedBank([FFNBank(D, WIDTHS), CopyBank(), ConstantBank(D, 2)])
    return MoELayer(ScoredRouter(LinearScore(D, 6, init_std=1.0), select), [bank]).double()


def parts(layer: MoELayer) -> tuple[FFNBank, ConstantBank]:
    assert isinstance(layer.bank, MixedBank)
    ffn, _, constant = layer.bank.banks
    assert isinstance(ffn, FFNBank) and isinstance(constant, ConstantBank)
    return ffn, constant


def swiglu(x: torch.Tensor, inner: torch.Tensor, outer: torch.Tensor) -> torch.Tensor:
    gate, up = inner.chunk(2)
    return reference.swiglu(x, gate, up, outer)


def by_the_equations(layer: MoELayer, x: torch.Tensor) -> torch.Tensor:
    ffn, constant = parts(layer)
    inner, outer = ffn.w_in.matrices(), ffn.w_out.matrices()
    gates = layer.router(x).dense()
    rows = []
    for token, gate in zip(x, gates, strict=True):
        outputs = [swiglu(token, inner[e], outer[e]) for e in range(2)]
        outputs += [reference.zero(token), reference.copy(token)]
        outputs += [reference.constant(token, constant.weight[i], constant.vector[i]) for i in range(2)]
        rows.append(sum(weight * output for weight, output in zip(gate, outputs, strict=True)))
    return torch.stack(rows)


@pytest.mark.parametrize("name", backend.EVERYWHERE)
@pytest.mark.parametrize("select", [TopK(2), TopK(6), TopP(0.7)], ids=["top-2", "all", "top-p"])
def test_mixture_equals_the_equations(select: TopK | TopP, name: str) -> None:
    layer = mixture(select)
    x = torch.randn(19, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    with backend.force(name):
        y, _ = layer(x)
        have = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
    want_y = by_the_equations(layer, x)
    want = torch.autograd.grad(want_y.square().sum(), [x, *layer.parameters()])
    torch.testing.assert_close(y, want_y, **FLOAT64)
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b, **FLOAT64)


def test_only_feed_forward_experts_have_width_and_most_flops() -> None:
    layer = mixture(TopK(2))
    x = torch.randn(40, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    _, (trace,) = layer(x)
    load = trace.routing.load()
    assert layer.bank.row_widths().tolist() == [3, 5, 0, 0, 0, 0]  # type: ignore[union-attr]
    assert layer.bank.row_flops().tolist() == [6 * D * 3, 6 * D * 5, 0, 0, 6 * D, 6 * D]  # type: ignore[union-attr]
    assert trace.active_width().sum() == 3 * load[0] + 5 * load[1]
    work = 6 * D * (3 * load[0] + 5 * load[1] + load[4] + load[5])
    assert layer.flops(trace.routing).item().useful == 2 * 40 * 6 * D + work
    parameters = sum(p.numel() for p in layer.bank.parameters())
    assert parameters == 3 * D * 8 + 3 * D * 2
    assert idle_parameters([trace]) == pytest.approx(parameters - float(work) / 2 / 40)


def test_a_constant_expert_starts_as_in_the_paper() -> None:
    torch.manual_seed(0)
    bank = ConstantBank(400, 50)
    assert abs(float(bank.vector.detach().std()) - 1) < 0.02
    assert abs(float(bank.weight.detach().std()) * 20 - 1) < 0.02


def test_sizes_are_counted_without_weights() -> None:
    with torch.device("meta"):
        bank = MixedBank([FFNBank(D, WIDTHS), CopyBank(2), SingletonBank(D, 3)])
    assert bank.row_widths().tolist() == [3, 5, 0, 0, 0, 1, 1, 1]
    assert bank.expected_token_flops(8) == 6 * D * 8 + 3 * 4 * D


def test_experts_stay_in_their_banks() -> None:
    bank = MixedBank([FFNBank(D, WIDTHS), CopyBank(), ConstantBank(D, 2)])
    with pytest.raises(ValueError, match=r"index=\[0, 3, 1\]: position 2 belongs to bank 0 and stands behind one of "):
        bank.reindex(torch.tensor([0, 3, 1]))
    constant = bank.banks[2]
    assert isinstance(constant, ConstantBank)
    vectors = constant.vector.detach().clone()
    bank.reindex(torch.tensor([2, 0, 5, 4, 5, -1]))
    assert [type(part).__name__ for part in bank.banks.children()] == ["FFNBank", "ConstantBank"]
    assert bank.n_experts == 6 and bank.row_widths().tolist() == [0, 3, 0, 0, 0, 0]
    torch.testing.assert_close(constant.vector[:3], vectors[[1, 0, 1]])
    assert not torch.isin(constant.vector[3], vectors).any()


def test_rows_for_an_optimizer_of_rows_are_found_inside() -> None:
    singleton = SingletonBank(D, 3, sparse_gradients=True)
    assert MixedBank([CopyBank(), singleton]).row_parameters() == singleton.row_parameters() != ()


@pytest.mark.parametrize("make", [lambda: CopyBank(0), lambda: ConstantBank(4, 0)])
def test_no_experts_are_refused(make) -> None:
    with pytest.raises(ValueError, match="n_experts=0, allowed: at least 1"):
        make()


def test_an_empty_mixture_is_refused() -> None:
    with pytest.raises(ValueError, match=r"banks=\[\], allowed: at least one bank of experts"):
        MixedBank([])


def recipe(banks: str) -> Transformer:
    return build_model(load_recipe(RECIPE, [f"model.ffn.branches=[{{kind: mixed, banks: [{banks}]}}]"]), 16, "meta")


def test_recipes_mix_banks() -> None:
    model = recipe("{kind: ffn, widths: [64, 64, 0]}, {kind: copy}, {kind: constant, n_experts: 2}")
    for layer in model.moe_layers().values():
        assert layer.router.n_experts == 6
        assert layer.expert_widths().tolist() == [64, 64, 0, 0, 0, 0]  # type: ignore[union-attr]
    with pytest.raises(RecipeError, match="unknown kind 'mixed'; allowed: .*constant, copy, "):
        recipe("{kind: mixed, banks: []}")

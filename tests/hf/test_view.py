"""Blocks of every family as our layers: the same tensors, the same bits."""

import pytest
import torch
from torch import nn

from moestro.hf import dense_view, view
from moestro.hf.view import layers_of, places
from moestro.layers import DenseFFN, MoELayer
from moestro.ops import backend
from tests.hf.families import DENSE, MOE, tiny
from tests.tolerances import FLOAT32, FLOAT32_LAST_BITS, FLOAT64

FAMILIES = [*MOE, *DENSE]


def hidden(dtype=torch.float32) -> torch.Tensor:
    return torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(2), dtype=dtype)


def output(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = block(x)
    return y[0] if isinstance(y, tuple) else y


def pairs(family, **given):
    """Every block of a model beside our layer over its tensors."""
    model = tiny(family, **given)
    seen = layers_of(model)
    return [(place.block, seen[number].eval()) for number, place in places(model).items()]


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_hold_the_block_s_own_tensors_and_all_of_them(family):
    for block, layer in pairs(family):
        theirs = {p.data_ptr() for p in block.parameters()}
        assert {p.data_ptr() for p in layer.parameters()} == theirs and theirs
        assert {id(p) for p in layer.parameters()} == {id(p) for p in block.parameters()}
        for name, buffer in block.named_buffers():
            assert name == "gate.e_score_correction_bias" and layer.router.bias is buffer


@pytest.mark.parametrize("family", FAMILIES)
def test_the_definition_gives_eager_s_bits(family):
    for block, layer in pairs(family):
        with backend.force("reference"), torch.no_grad():
            assert torch.equal(layer(hidden())[0], output(block, hidden()))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_eager_s(family):
    for block, layer in pairs(family, dtype=torch.float64):
        want = output(block, hidden(torch.float64))
        have, _ = layer(hidden(torch.float64))
        # most round scores to float32 inside, whatever they are given
        close = FLOAT64 if family in ("phimoe", "gpt_oss", *DENSE) else FLOAT32_LAST_BITS
        torch.testing.assert_close(have, want, **close)
        weight, parameters = torch.linspace(1, 2, want.numel()).view_as(want), list(block.parameters())
        gradients = torch.autograd.grad((want * weight).sum(), parameters)
        mine = torch.autograd.grad((have * weight).sum(), parameters)
        for gradient, my_gradient in zip(gradients, mine, strict=True):
            torch.testing.assert_close(my_gradient, gradient, **close)


@pytest.mark.parametrize("family", MOE)
def test_the_fast_operation_is_close(family):
    for block, layer in pairs(family):
        with torch.no_grad():
            torch.testing.assert_close(layer(hidden())[0], output(block, hidden()), **FLOAT32)


def test_layers_are_sorted_by_what_they_are():
    model = tiny("deepseek_v3")
    assert isinstance(dense_view(model)[0], DenseFFN) and list(dense_view(model)) == [0]
    assert isinstance(view(model)[1], MoELayer) and list(view(model)) == [1]
    assert view(tiny("llama")) == {} and list(dense_view(tiny("gpt2"))) == [0, 1]


CASES = {
    "qwen3 without renormalisation": ("qwen3_moe", {"norm_topk_prob": False}),
    "qwen2 with it": ("qwen2_moe", {"norm_topk_prob": True}),
    "olmoe with it": ("olmoe", {"norm_topk_prob": True}),
    "a renormalisation that is not done": ("deepseek_v2", {"norm_topk_prob": True}),
    "greedy": ("deepseek_v2", {"topk_method": "greedy"}),
    "raw sigmoids": ("deepseek_v3", {"norm_topk_prob": False}),
    "all groups": ("deepseek_v3", {"topk_group": 4}),
    "one expert": ("mixtral", {"num_experts_per_tok": 1}),
    "three experts": ("mixtral", {"num_experts_per_tok": 3}),
    "exact gelu": ("mixtral", {"hidden_act": "gelu"}),
    "no clamp to speak of": ("gpt_oss", {"swiglu_limit": 0.05}),
    "near and far logits": ("phimoe", {"router_jitter_noise": 0.3}),
}


@pytest.mark.parametrize("case", CASES)
def test_what_a_config_changes_is_seen(case):
    family, changes = CASES[case]
    for block, layer in pairs(family, **changes):
        with backend.force("reference"), torch.no_grad():
            have, traces = layer(hidden())
            assert torch.equal(have, output(block, hidden()))
        if traces and "num_experts_per_tok" in changes:
            assert float(traces[0].experts_per_token().max()) == changes["num_experts_per_tok"]


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_gates_of_many_experts_are_theirs_but_for_the_last_bit(family):
    """Theirs are summed in the order of an unsorted top-k."""
    for block, layer in pairs(family, num_experts_per_tok=4):
        with backend.force("reference"), torch.no_grad():
            torch.testing.assert_close(layer(hidden())[0], output(block, hidden()), **FLOAT32_LAST_BITS)


def test_the_bias_steers_the_choice_and_stays_shared():
    (_, layer), *_ = [pair for pair in pairs("deepseek_v3") if isinstance(pair[1], MoELayer)]
    _, (before,) = layer(hidden())
    layer.router.bias.copy_(torch.tensor([9.0, 9, 0, 0, 0, 0, 9, 9]))
    _, (after,) = layer(hidden())
    assert set(after.routing.expert.tolist()) <= {0, 1, 6, 7} < set(before.routing.expert.tolist())


def test_phi_moe_s_router_trains_as_transformers_does():
    model = tiny("phimoe", router_jitter_noise=0.3, input_jitter_noise=0.0).train()
    block, layer = places(model)[0].block, view(model)[0].train()
    x = hidden().flatten(0, 1)
    torch.manual_seed(5)
    _, weights, ids = block.router(x.clone())
    gradient = torch.autograd.grad((weights * torch.linspace(1, 2, 44).view(22, 2)).sum(), block.router.weight)
    torch.manual_seed(5)
    routing = layer.router(x)
    mine = torch.autograd.grad((routing.weight * torch.linspace(1, 2, 44)).sum(), block.router.weight)
    assert torch.equal(routing.expert.view(22, 2), ids) and len(set(ids[:, 0].tolist())) > 1
    # theirs draws the second expert's factor twice, so that it may be the other one; gradients know no factor
    have = routing.weight.view(22, 2)
    torch.testing.assert_close(have[:, 0], weights[:, 0], **FLOAT32)
    ratio = (have / weights)[:, 1].detach()
    assert all(any(abs(r - f) < 1e-4 for f in (1, 0.3333, 1 / 0.3333)) for r in ratio.tolist())
    torch.testing.assert_close(mine, gradient, **FLOAT32)
    layer.eval()
    assert not torch.equal(layer.router(x).expert.view(22, 2), ids)


def test_unknown_families_and_activations_are_refused():
    model = tiny("mixtral", hidden_act="quick_gelu")
    with pytest.raises(ValueError, match="experts of activation QuickGELU.*allowed: silu, gelu, "):
        view(model)
    model.config.model_type = "bert"
    with pytest.raises(ValueError, match="model_type 'bert', allowed: mixtral, .*gpt2"):
        view(model)


@pytest.mark.parametrize("family", DENSE)
def test_matrices_of_dense_layers_are_views_in_one_layout(family):
    model = tiny(family)
    layer = dense_view(model)[0]
    m, x = layer.expert.matrices(), hidden()
    up = nn.functional.linear(x, m.up, m.up_bias)
    act = layer.expert.activation
    middle = act(up) if m.gate is None else act(nn.functional.linear(x, m.gate, m.gate_bias)) * up
    torch.testing.assert_close(nn.functional.linear(middle, m.down, m.down_bias), layer(x)[0], **FLOAT32)
    assert m.up.untyped_storage().data_ptr() == layer.expert.up.weight.untyped_storage().data_ptr()
    assert layer.expert.width == len(m.up) == (128 if family == "gpt2" else 40)
    assert layer.expected_token_flops() == 2 * (m.up.numel() + m.down.numel()) + 2 * (
        0 if m.gate is None else m.gate.numel()
    )
